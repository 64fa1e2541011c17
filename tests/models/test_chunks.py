"""Samples in chunks: elements bit for bit, outputs and gradients to rounding."""

import re

import pytest
import torch

from probsym_fast import Symmetrized, _checkpointing
from probsym_fast.distributions import GIN, Frame, Learned, Uniform
from probsym_fast.groups import Draws, Euclidean, Symmetric, narrow
from probsym_fast.groups.elements import samples_of, tensors
from probsym_fast.models.chunks import Chunks
from tests.conftest import assert_near
from tests.helpers.chunked import C, N, S, assert_same, graph_model, noisy, outcome
from tests.helpers.graphs import random_graphs
from tests.models.test_symmetrized import SYMMETRIES, clouds
from tests.models.test_symmetrized import model as cloud_model


def with_draws(f: Symmetrized, kind: str) -> Symmetrized:
    f.draws = kind
    return f


CASES = {
    **{f"n-body {name}": (lambda name=name: cloud_model(name), clouds) for name in SYMMETRIES},
    "n-body uniform": (lambda: cloud_model("O3", distribution=Uniform(Euclidean(3))), clouds),
    **{
        name: (lambda name=name: graph_model(name).double(), lambda: random_graphs([3, 1, 9, 5]))
        for name in ("flat MLP", "slots", "GIN", "ViT nodes", "ViT pooled")
    },
    "frame": (lambda: graph_model("flat MLP", Frame(Symmetric(N))).double(), lambda: random_graphs([3, 1, 9, 5])),
    "antithetic": (  # chunks cut pairs, and blocks of 8
        lambda: with_draws(graph_model("flat MLP").double(), "antithetic"),
        lambda: random_graphs([3, 1, 9, 5]),
    ),
    "stratified": (lambda: with_draws(cloud_model("O3", distribution=Uniform(Euclidean(3))), "stratified"), clouds),
}


@pytest.mark.parametrize("name", CASES)
def test_chunks_change_nothing(name):
    """The elements bit for bit, prediction and gradients (those of the distribution too) to rounding."""
    f, batch = CASES[name][0](), CASES[name][1]()
    expected = outcome(f, batch)
    statistics = {k: x.clone() for k, x in f.named_buffers()}
    for size in (1, 3, S, S + 1):  # 3: the last chunk is of one
        for k, x in f.named_buffers():
            x.copy_(statistics[k])
        f.chunks = Chunks(size)
        seen = []
        hook = f.embed.register_forward_pre_hook(lambda _, x: seen.append(list(tensors(x[2]))))  # noqa: B023
        found = outcome(f, batch)
        hook.remove()
        assert_same(found, expected)
        count = -(-S // min(size, S))
        assert len(seen) == 2 * count - 1  # all but the last again in the backward pass
        for k, whole in enumerate(expected[2]):
            assert torch.equal(torch.cat([chunk[k] for chunk in seen[:count]], 1), whole)
        with torch.no_grad():
            f.eval()
            y, _ = f(batch, S, torch.Generator().manual_seed(5))
            f.chunks = Chunks()
            assert_near(y, f(batch, S, torch.Generator().manual_seed(5))[0], {torch.float64: 1e-12})


def test_elements_in_parts():
    batch = clouds()
    for group in (g for g, *_ in SYMMETRIES.values()):
        g = group.uniform(batch, S, Draws(seed=1))
        x = torch.randn(3, S, 5, 3, dtype=torch.float64)
        assert samples_of(g) == S
        assert torch.equal(group.act(narrow(g, 2, 3), x[:, 2:5], "np"), group.act(g, x, "np")[:, 2:5])
    learned = Learned(Symmetric(N), GIN(C, 8).double(), tau=0.1)
    soft, _ = learned(random_graphs([3, 9]), S, Draws(seed=1))
    part = narrow(soft, 2, 3)
    assert type(part) is type(soft) and part.requires_grad and part.num_nodes is soft.num_nodes
    assert torch.equal(part.dense(), soft.dense()[:, 2:5])
    with pytest.raises(TypeError, match="narrow: g must be a Tensor, a Permutation or a tuple of these, got str"):
        narrow("g", 0, 1)
    with pytest.raises(TypeError, match=re.escape("samples_of: g must hold tensors (B, S, ...), got tuple")):
        samples_of(())


def test_recomputation_repeats_dropout_and_counts_statistics_once(monkeypatch):
    batch = random_graphs([3, 1, 9, 5])
    f = noisy(3)
    found = outcome(f, batch)
    monkeypatch.setattr(_checkpointing, "checkpoint", lambda function, *arguments, **_: function(*arguments))
    kept = noisy(3)
    expected = outcome(kept, batch)
    assert len(f.backbone.calls) == 2 * len(kept.backbone.calls) - 1  # all but the last chunk
    assert torch.equal(found[0], expected[0])
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    for (name, a), (_, b) in zip(f.named_buffers(), kept.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert f.backbone.norm.num_batches_tracked == 3


def test_chunks_are_differentiated_again():
    batch = random_graphs([3, 1, 9, 5])
    f = noisy(3)
    y, penalties = f.train()(batch, S, torch.Generator().manual_seed(5))
    total = y.square().sum() + sum(penalties.values())
    total.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in f.named_parameters() if p.grad is not None}
    statistics = [x.clone() for x in f.buffers()]
    total.backward()
    for name, p in f.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * once[name], rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(statistics, f.buffers(), strict=True))


def test_a_compiled_model_in_chunks_runs_them_as_they_are():
    batch = random_graphs([3, 1, 9, 5])
    f = noisy(3, dropout=0).train()
    found = []
    for model in (f, torch.compile(f, backend="eager")):
        torch.manual_seed(1)
        found.append(model(batch, S, torch.Generator().manual_seed(5))[0])
    assert_near(*found)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile the backbone instead"):
        torch.compile(f, backend="eager", fullgraph=True)(batch, S)


def test_bad_chunks():
    parts = graph_model("flat MLP")
    for error, how, message in (
        (ValueError, {"chunk": 0}, "chunk must be an int >= 1, None or 'auto', got 0"),
        (TypeError, {"chunk": 2.5}, "chunk must be an int >= 1, None or 'auto', got 2.5"),
        (TypeError, {"chunk": "7"}, "chunk must be an int >= 1, None or 'auto', got '7'"),
        (TypeError, {"chunk": True}, "chunk must be an int >= 1, None or 'auto', got True"),
        (ValueError, {"chunk": "auto", "memory": 0}, "memory must be an int >= 1 or None, got 0"),
        (TypeError, {"chunk": "auto", "memory": 1e9}, "memory must be an int >= 1 or None, got 1000000000.0"),
        (TypeError, {"chunk": "auto", "memory": "auto"}, "memory must be an int >= 1 or None, got 'auto'"),
        (ValueError, {"chunk": 4, "memory": 5}, "memory must be None unless chunk is 'auto', got 5 and 4"),
        (ValueError, {"draws": "x"}, "draws must be one of ('independent', 'antithetic', 'stratified'), got 'x'"),
    ):
        with pytest.raises(error, match=f"^{re.escape(f'Symmetrized: {message}')}$"):
            Symmetrized(parts.backbone, parts.embed, parts.readout, parts.distribution, **how)
    with pytest.raises(ValueError, match=r"^Chunks: size must be an int >= 1, None or 'auto', got 0$"):
        Chunks(0)
    with pytest.raises(ValueError, match=r"^Chunks: memory must be None unless size is 'auto', got 5 and 4$"):
        Chunks(4, 5)
