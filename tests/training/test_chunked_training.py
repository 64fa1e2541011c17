"""Training with samples in chunks: the keys, the same weights, and steps that run out of memory."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from probsym_fast import tasks
from probsym_fast.models import Symmetrized
from probsym_fast.models.chunks import Fit
from probsym_fast.training import run as training
from probsym_fast.training.settings import Samples
from tests.helpers.tiny import Tiny, tiny

S = 5


class Small(nn.Module):
    """A backbone that lacks memory for so many rows in the backward pass, the steps left."""

    def __init__(self, net: nn.Module, most: int, failures: int):
        super().__init__()
        self.net, self.most, self.failures, self.failed = net, most, failures, 0

    def forward(self, x):
        in_backward = torch._C._current_graph_task_id() >= 0
        if in_backward and x.shape[:2].numel() > self.most and self.failed < self.failures:
            self.failed += 1
            raise torch.OutOfMemoryError("too many rows")
        return self.net(x)


class Chunked(Tiny):
    """5 noisy copies in chunks."""

    most, failures, chunk = 8, 0, None

    def model(self, fresh: bool = True) -> Symmetrized:
        whole = super().model(fresh)
        net = Small(whole.backbone, self.most, self.failures)
        model = Symmetrized(net, whole.embed, whole.readout, whole.distribution, chunk=self.chunk)
        if self.chunk == "auto":  # as if measured
            model.chunks._fit[True] = Fit(S, 10**6, 2)
        return model


def weights(folder, chunk=None, failures=0, **settings) -> tuple[dict, Small]:
    made = []
    kind = type("Kind", (Chunked,), {"chunk": chunk, "failures": failures})
    kind.model = lambda self, fresh=True: made.append(Chunked.model(self, fresh)) or made[-1]
    task = tiny(folder, kind, noise=0.5, lr=0.05, **settings)
    task.config = replace(task.config, samples=Samples(S, S, S, 1))
    training.fit(task)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return last["state_dict"], made[0].backbone


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}])
def test_training_in_chunks_gives_the_same_weights(tmp_path, settings):
    expected, _ = weights(tmp_path / "whole", **settings)
    found, _ = weights(tmp_path / "chunks", chunk=2, **settings)
    with pytest.warns(UserWarning, match="out of memory with 2 samples at once; 1 from now on"):
        retried, small = weights(tmp_path / "auto", chunk="auto", failures=1, **settings)
    assert small.failed == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(retried[name], value, rtol=1e-4, atol=1e-5)


def test_dropout_of_a_retried_step_repeats(tmp_path):
    """The failed step is the same again but for its chunk: that of a run whose chunk is 1 throughout."""
    expected, _ = weights(tmp_path / "ones", chunk=1, dropout=0.4)
    with pytest.warns(UserWarning, match="out of memory"):
        found, _ = weights(tmp_path / "auto", chunk="auto", failures=1, dropout=0.4)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_errors_go_on_where_nothing_is_left_to_halve(tmp_path):
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        weights(tmp_path / "auto", chunk="auto", failures=99, batch=12)
    with pytest.raises(torch.OutOfMemoryError):
        weights(tmp_path / "two", chunk=2, failures=1)


def test_keys():
    for name in ("nbody/gnn_O3_ps", "exp_classify/mlp_ps"):
        model = tasks.load(name, ["--samples.chunk", "3"]).model()
        assert model.chunks.size == 3 and model.chunks.memory is None
        model = tasks.load(name, ["--samples.chunk", "auto", "--samples.memory", "0.5"]).model()
        assert model.chunks.size == "auto" and model.chunks.memory == 500_000_000
        assert tasks.load(name).model().chunks.size is None
        assert tasks.load(name, ["--samples.draws", "antithetic"]).model().draws == "antithetic"
    for flags, message in (
        (["--samples.chunk", "0"], 'config: samples.chunk must be at least 1, "auto" or null, got 0'),
        (["--samples.chunk", "all"], "config: samples.chunk must be at least 1, \"auto\" or null, got 'all'"),
        (["--samples.memory", "1"], "config: samples.memory must be null unless samples.chunk is auto, got 1.0"),
        (["--samples.chunk=auto", "--samples.memory=-1"], "config: samples.memory must be finite and > 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            tasks.load("nbody/gnn_O3_ps", flags)
