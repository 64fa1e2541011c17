"""What the host does for a GPU in a training step does not grow unnoticed: the counts of benchmarks/gpu_model/dispatches."""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_model import dispatches
from benchmarks.test_steps import SMALL_MODELS
from probsym_fast.distributions.vector_layers import EdgeConvolution

KEPT = json.loads(dispatches.TABLE.read_text())
same_torch = pytest.mark.skipif(
    KEPT["torch"] != torch.__version__.split("+")[0], reason="torch of another version has other calls"
)


def test_the_table_has_all_small_models():
    assert list(KEPT["models"]) == list(SMALL_MODELS)


@same_torch
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_dispatches_and_launches_of_a_training_step(name):
    grown = dispatches.grown(dispatches.of_model(name), KEPT["models"][name])
    assert not grown, "\n".join(grown)


@same_torch
def test_what_has_grown_is_said():
    """The distribution by steps, which takes no op."""

    def by_steps(model):
        for part in model.modules():
            if isinstance(part, EdgeConvolution):
                part.one_pass = False

    name = "n-body GNN-PS"
    found, before = dispatches.of_model(name, by_steps), KEPT["models"][name]
    said = dispatches.grown(found, before)
    calls = f"step: {found['step']['calls']} calls, were {before['step']['calls']}; {dispatches.COMMAND}"
    assert calls in said and not any(x.startswith("bare") for x in said)


def test_a_twentieth_more_passes():
    before = {"step": {"calls": 100}}
    assert dispatches.grown({"step": {"calls": 105}}, before) == []
    assert dispatches.grown({"step": {"calls": 106}}, before) == [f"step: 106 calls, were 100; {dispatches.COMMAND}"]
