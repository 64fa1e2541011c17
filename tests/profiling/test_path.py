"""The path of a backbone that can run in one pass, as a profile reports it."""

import pytest
import torch

import probsym_fast as psf
from probsym_fast import models
from probsym_fast.distributions import Uniform
from probsym_fast.groups import Euclidean
from probsym_fast.ops import OPS
from probsym_fast.profiling.results import read_profiles
from tests.models.test_symmetrized import clouds

built = pytest.mark.skipif("cpu" not in OPS["message_passing"].backends("cpu"), reason="the extension is not built")


def model(backbone: torch.nn.Module) -> psf.Symmetrized:
    return psf.Symmetrized(backbone, models.NodeVectors(), models.NodeReadout(displacement=True), Uniform(Euclidean(3)))


@built
@pytest.mark.parametrize("mode", ["training", "inference", "variance"])
def test_the_path_is_that_of_the_batch(mode, tmp_path):
    batch, file = clouds().to(torch.float32), tmp_path / "profile.json"
    few = f"modules: {batch.size} graphs, fewer than 4"
    assert batch.size < 4
    net = model(models.MessagePassing(width=8, layers=1))
    found = psf.profile(net, batch, samples=(1, 4), modes=(mode,), seconds=0.001, repeats=2, path=file)
    assert [row.path for row in found.rows] == [few, "one pass"]
    assert found.table().splitlines()[1].endswith(few)
    assert [row.path for row in read_profiles(file)[0].rows] == [few, "one pass"]
    net.backbone.one_pass = False
    (row,) = psf.profile(net, batch, samples=(4,), modes=(mode,), seconds=0.001, repeats=2).rows
    assert row.path == "modules: one_pass is False"
    assert not net.backbone._forward_pre_hooks


class Plain(torch.nn.Module):
    def forward(self, x, edges):
        return x[..., :3]


def test_other_backbones_have_none():
    (row,) = psf.profile(model(Plain()), clouds(), samples=(1,), modes=("inference",), seconds=0.001, repeats=2).rows
    assert row.path is None
