"""Samples in chunks: elements bit for bit, outputs and gradients to rounding, and what happens where memory ends."""

import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from probsym_fast import Symmetrized, _checkpointing, models
from probsym_fast._memory import peak_memory
from probsym_fast.distributions import GIN, Frame, Learned, Uniform, UniformNoise, VectorNeurons, distribution
from probsym_fast.groups import Draws, Euclidean, Symmetric, narrow
from probsym_fast.groups.elements import samples_of, tensors
from probsym_fast.models import chunks as module
from probsym_fast.models.chunks import MARGIN, Chunks, Fit
from probsym_fast.ops import OPS
from tests.conftest import assert_near
from tests.helpers.graphs import random_graphs
from tests.models.test_symmetrized import SYMMETRIES, clouds
from tests.models.test_symmetrized import model as cloud_model

S, N, C = 7, 9, 2
WIDTH = 64  # of the vision transformer
VIT = {"depth": 3, "embed_dim": WIDTH, "num_heads": 2}


def vit(read: str, readout, node_features: int = C, **settings):
    backbone = models.timm_backbone("vit_tiny_patch16_224", grid=3, read=read, **VIT, **settings)
    return backbone, models.GraphTokens(N, WIDTH, 3, node_features), readout


def graph_model(name: str, distribution=None) -> Symmetrized:
    if name == "flat MLP":
        parts = models.MLP([16, 8, 3]), models.FlatGraph(N, 16, C), models.MeanReadout()
    elif name == "slots":
        parts = models.MLP([16, 8]), models.FlatGraph(N, 16, C), models.SlotReadout(N, 8)
    elif name == "GIN":
        parts = models.GINBackbone(8, 2, 3, "relu"), models.IdentifiedNodes(N, 8, C), models.MeanReadout()
    elif name == "ViT nodes":
        parts = vit("diagonal", models.DiagonalReadout(N, WIDTH, 3, 4))
    else:
        parts = vit("pooled", models.GraphReadout(WIDTH, 4))
    learned = Learned(Symmetric(N), GIN(C, 8, dropout=0.1), UniformNoise(), tau=0.1)
    return Symmetrized(*parts, distribution or learned)


def with_draws(f: Symmetrized, kind: str) -> Symmetrized:
    f.draws = kind
    return f


def outcome(
    f: Symmetrized, batch, samples=S, loss=lambda y: (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
):
    """Prediction, gradients and the elements' tensors, in training."""
    f.train().zero_grad()
    drawn = []
    hook = f.distribution.register_forward_hook(lambda *x: drawn.append(list(tensors(x[-1][0]))))
    torch.manual_seed(3)
    y, penalties = f(batch, samples, torch.Generator().manual_seed(5))
    hook.remove()
    (loss(y) + sum(penalties.values())).backward()
    return y.detach(), {n: p.grad for n, p in f.named_parameters() if p.grad is not None}, drawn[0]


def assert_same(found, expected):
    assert_near(found[0], expected[0], {torch.float64: 1e-12})
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_near(found[1][name], gradient, {torch.float64: 1e-10})
    for a, b in zip(found[2], expected[2], strict=True):
        assert torch.equal(a, b)


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


class Noisy(nn.Module):
    """A backbone with batch statistics and dropout in front of another; it may lack memory for so many rows."""

    def __init__(self, then: nn.Module, width: int, dropout: float = 0.3, most: int | None = None):
        super().__init__()
        self.norm, self.drop, self.then = nn.BatchNorm1d(width), nn.Dropout(dropout), then
        self.most, self.recomputed_alone, self.calls = most, False, []

    def forward(self, x):
        rows = x.shape[:-1].numel()
        again = torch._C._current_graph_task_id() >= 0  # within a backward pass
        self.calls.append((rows, again))
        x = self.drop(self.norm(x.flatten(0, 1)).view(x.shape))
        if self.most is not None and rows > self.most and (again or not self.recomputed_alone):
            raise torch.OutOfMemoryError(f"{rows} rows")
        return self.then(x)


def noisy(chunk=None, dropout=0.3, most=None, **settings) -> Symmetrized:
    torch.manual_seed(0)
    f = graph_model("flat MLP").double()
    f.backbone = Noisy(f.backbone, 16, dropout, most).double()
    f.chunks = Chunks(chunk, **settings)
    return f


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


def test_auto_halves_where_memory_ends_in_forward():
    """10 of 7 * 4 rows at once: 7, 4, then 2 samples."""
    batch = random_graphs([3, 1, 9, 5])
    f, expected = noisy("auto", most=10), outcome(noisy(2), batch)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = outcome(f, batch)
    assert_same(found, expected)  # dropout and running statistics as if nothing had failed
    for (name, a), (_, b) in zip(f.named_buffers(), noisy_after(2, batch), strict=True):
        assert torch.equal(a, b), name
    wanted = [(7, 4), (4, 2)]
    assert [str(w.message) for w in said] == [
        f"Symmetrized: out of memory with {a} samples at once; {b} from now on" for a, b in wanted
    ]
    f.backbone.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(f, batch)
    assert max(rows for rows, _ in f.backbone.calls) == 8  # remembered
    with torch.no_grad(), pytest.warns(UserWarning, match="out of memory") as said:
        f(batch, S)
    assert len(said) == 2  # found for itself without gradients
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        outcome(noisy("auto", most=3), batch)
    with pytest.raises(torch.OutOfMemoryError):
        outcome(noisy(4, most=10), batch)


@pytest.mark.parametrize("reduce", ["none", "max", "weighted"])
def test_auto_halves_for_every_reduction(reduce):
    batch = random_graphs([3, 1, 9, 5])
    weights = torch.rand(4, S, dtype=torch.float64) if reduce == "weighted" else None

    def gradients(f: Symmetrized) -> tuple:
        f.train().zero_grad()
        y, penalties = f(batch, S, torch.Generator().manual_seed(5), reduce=reduce, weights=weights)
        (y.square().sum() + sum(penalties.values())).backward()
        return y.detach(), {n: p.grad for n, p in f.named_parameters() if p.grad is not None}, []

    f = noisy("auto", dropout=0, most=10)
    with pytest.warns(UserWarning, match="out of memory") as said:
        found = gradients(f)
    assert str(said[-1].message).endswith("out of memory with 4 samples at once; 2 from now on")
    assert_same(found, gradients(noisy(2, dropout=0)))
    small = noisy("auto", memory=1)
    gradients(small)
    assert small.chunks.size_for(S) == 1  # measured


def noisy_after(chunk: int, batch) -> list:
    f = noisy(chunk)
    outcome(f, batch)
    return list(f.named_buffers())


@pytest.mark.parametrize("before", [None, 2.0])
def test_steps_that_run_out_of_memory_in_backward_are_retried(before):
    """Nothing is lost: gradients of the failed attempt are dropped, those of before are added to once."""
    batch = random_graphs([3, 1, 9, 5])
    f, other = noisy("auto", most=10), noisy(2)
    f.chunks._fit[True] = Fit(S, 4, 4)  # 4 samples, 16 rows, are too many in the backward pass alone
    f.backbone.recomputed_alone = True
    for each in (f, other):
        for p in each.parameters():
            p.grad = None if before is None else torch.full_like(p, before)

    def step(model):
        y, penalties = model(batch, S, torch.Generator().manual_seed(5))
        (y.square().sum() + sum(penalties.values())).backward()
        return y.detach()

    torch.manual_seed(3)
    expected = step(other)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="out of memory with 4 samples at once; 2 from now on"):
        found = f.step_with_smaller_chunks(lambda: step(f), S)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q in zip(f.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for (name, a), (_, b) in zip(f.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    f.backbone.most = 3
    kept = [None if p.grad is None else p.grad.clone() for p in f.parameters()]
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        f.step_with_smaller_chunks(lambda: step(f), S)
    for p, q in zip(f.parameters(), kept, strict=True):
        assert p.grad is q is None or torch.equal(p.grad, q)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_steps_that_fail_leave_gradients_and_statistics_alone(error):
    batch, f = random_graphs([3, 1, 9, 5]), noisy(2)
    for p in f.parameters():
        p.grad = torch.ones_like(p)
    held, buffers = [p.grad for p in f.parameters()], {name: x.clone() for name, x in f.named_buffers()}

    def step():
        y, _ = f(batch, S, torch.Generator().manual_seed(5))
        y.square().sum().backward()
        assert any(p.grad is not None for p in f.parameters())
        assert not all(torch.equal(x, buffers[name]) for name, x in f.named_buffers())
        raise error("behind the backward pass")

    with pytest.raises(error, match="behind the backward pass"):
        f.step_with_smaller_chunks(step, S)
    for p, old in zip(f.parameters(), held, strict=True):
        assert p.grad is old and torch.equal(old, torch.ones_like(p))
    assert all(torch.equal(x, buffers[name]) for name, x in f.named_buffers())


FAILING = """
import sys, torch
from probsym_fast._checkpointing import checkpointed

def function(x):
    if torch._C._current_graph_task_id() >= 0:
        raise torch.OutOfMemoryError("in the backward pass")
    return x.sin().cos()

x = torch.randn(5, requires_grad=True)
y = [checkpointed(function, k * x, device=x.device, modules=[]) for k in range(3)]
try:
    sum(y).sum().backward()
except torch.OutOfMemoryError as error:
    print(error)
"""


def test_a_process_whose_last_backward_pass_raised_ends_well():
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", FAILING], cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "in the backward pass\n", "")


@pytest.mark.parametrize("grad", [True, False])
def test_auto_measures_the_largest_chunk_within_a_limit(grad):
    batch = random_graphs([9] * 8)
    with nullcontext() if grad else torch.no_grad():
        whole = noisy("auto")
        state = torch.get_rng_state()
        whole.train()(batch, 32, torch.Generator().manual_seed(1))
        assert whole.chunks.size_for(32) == 32  # a CPU without a limit
        sizes, limits = {}, (1, 400_000, 900_000, 10**9) if grad else (1, 120_000, 300_000, 10**9)
        for limit in limits:
            f = noisy("auto", memory=limit).train()
            torch.set_rng_state(state)
            f(batch, 32, torch.Generator().manual_seed(1))
            sizes[limit] = f.chunks.size_for(32)
            assert f.backbone.norm.num_batches_tracked == -(-32 // sizes[limit])  # probes leave no trace
        none, some, more, all_of_them = sizes.values()
        assert none == 1 < some < more < 32 == all_of_them
        assert more >= 2 * some  # what does not grow with them is paid once


@pytest.mark.parametrize("limit", [400_000, 900_000, 1_500_000])
def test_a_step_stays_within_its_memory(limit):
    """As many samples as fit with their distribution and its gradients; for a larger batch they are measured again."""
    f = noisy("auto", memory=limit).train()
    for graphs in (8, 24):
        batch = random_graphs([9] * graphs)
        f(batch, 32)
        size = f.chunks.size_for(32)
        assert peak_at_once(batch, size) <= limit or size == 1
        assert peak_at_once(batch, min(2 * size, 32)) > 0.9 * limit or size == 32


def test_what_is_measured_has_its_backward_pass():
    f, passed = noisy("auto", memory=10**9).train(), set()
    for part in (f.backbone, f.distribution.network.score):
        part.register_full_backward_hook(lambda module, *_: passed.add(type(module)))
    f(random_graphs([9] * 8), 8)
    assert passed == {type(f.backbone), nn.Linear}


def peak_at_once(batch, samples: int) -> int:
    f = noisy(None).train()

    def step():
        y, penalties = f(batch, samples)
        (y.square().sum() + sum(penalties.values())).backward()

    return peak_memory(step, "cpu")


def test_auto_tries_again_where_the_distribution_runs_out_of_memory():
    batch = random_graphs([3, 1, 9, 5])
    f, other, failed = noisy("auto", dropout=0), noisy(4, dropout=0), []

    def fail(module, arguments, outputs):
        if not failed:
            failed.append(arguments[1])
            raise torch.OutOfMemoryError("the distribution")

    f.distribution.register_forward_hook(fail)
    with pytest.warns(UserWarning, match="out of memory with 7 samples at once; 4 from now on"):
        found = outcome(f, batch)
    assert failed == [S]
    assert_same(found, outcome(other, batch))
    f.chunks._fit[True] = f.chunks._fit[True]._replace(samples=1)  # as if more samples were asked for: 4 stay the most
    outcome(f, batch)
    assert f.chunks.size_for(S) == 4


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


def test_largest_chunk_of_a_measured_line():
    asked = []

    def peak(count: int, end: int = 100) -> int:
        asked.append(count)
        if count > end:
            raise torch.OutOfMemoryError
        return max(50, 10 * count)  # 50 bytes are taken anyway

    assert module.largest(peak, 64, free=200) == 18  # 180 bytes of it
    assert asked == [1, 2, 4, 8, 16, 32]
    assert module.largest(peak, 64, free=45) == 1
    assert module.largest(peak, 12, free=200) == 12
    assert module.largest(lambda count: peak(count, 20), 64, free=1000) == 31
    assert module.largest(lambda count: peak(count, 20), 64, free=200) == 18
    with pytest.raises(torch.OutOfMemoryError):
        module.largest(lambda count: peak(count, 0), 64, free=200)


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


# --- memory, by every allocation there is ---


def peak_of_a_step(f: Symmetrized, batch, samples: int, chunk: int | None) -> int:
    """Of forward, backward and the parameters' gradients; the batch and the parameters are there before."""
    f.chunks = Chunks(chunk)

    def step():
        y, penalties = f(batch, samples)
        (y.square().mean() + sum(penalties.values())).backward()

    f.zero_grad()
    return peak_memory(step, "cpu")


def peaks(f: Symmetrized, batch) -> tuple[int, int, int]:
    """4 samples at once, 64 at once, 64 in chunks of 4."""
    peak_of_a_step(f.train(), batch, 1, None)
    return tuple(peak_of_a_step(f, batch, *how) for how in ((4, None), (64, None), (64, 4)))


def test_peak_memory_counts_what_is_held_at_once():
    def hold():
        x = torch.empty(1000, dtype=torch.float64)
        for _ in range(3):
            y = torch.empty(250, dtype=torch.float64)
        del x, y
        return torch.empty(100)

    assert peak_memory(hold, "cpu") in range(
        8000 + 2 * 2000, 8000 + 2 * 2000 + 200
    )  # allocations are rounded to 64 bytes
    with pytest.raises(RuntimeError, match="peak_memory: device must be a CPU or a CUDA GPU, got meta"):
        peak_memory(hold, "meta")


def many_clouds():
    return clouds(16, torch.float32)


def some_graphs():
    return random_graphs([9] * 32, dtype=torch.float32)


def nbody(kind: str) -> Symmetrized:
    if kind == "gnn":
        parts = models.MessagePassing(), models.NodeVectors(), models.NodeReadout(displacement=False)
    else:
        backbone = models.Transformer(layers=2, tokens=25, read=[0, 6, 12, 18, 24])
        parts = backbone, models.PairTokens(), models.NodeReadout(displacement=True)
    return Symmetrized(*parts, Uniform(Euclidean(3)))


@pytest.mark.parametrize("name", ["gnn", "transformer", "ViT nodes", "ViT pooled"])
def test_memory_is_flat_in_the_samples(name):
    if name.startswith("ViT"):
        f, batch = graph_model(name, Uniform(Symmetric(N))), some_graphs()
    else:
        f, batch = nbody(name), many_clouds()
        f.backbone.one_pass = False
    few, many, chunked = peaks(f, batch)
    assert many > 10 * few  # all at once
    assert chunked < 1.1 * few


@pytest.mark.skipif(not OPS["transformer"].has_kernel("cpu"), reason="the kernels are not built")
@pytest.mark.parametrize("name", ["gnn", "transformer"])
def test_auto_computes_layers_again_before_it_splits_the_samples(name):
    f, batch = nbody(name), many_clouds()
    few, kept, _ = peaks(f, batch)
    f.backbone.recompute = True
    _, again, _ = peaks(f, batch)
    assert again < 0.8 * kept
    assert 1.5 * few < again  # too little for all samples either way
    for memory, recompute in ((1.2 * kept, False), ((kept + again) / 2, True), (1.2 * few, False)):
        f.backbone.recompute, f.chunks = False, Chunks("auto", memory=round(memory / MARGIN))
        f(batch, 64)
        assert f.backbone.recompute == recompute
        assert (f.chunks.size_for(64) == 64) == (memory > again)


@pytest.mark.parametrize(("name", "share"), [("VectorNeurons", 0.9), ("GIN", 0.6)])
def test_layers_computed_again_change_nothing_but_memory(name, share):
    """Elements, gradients and statistics bit for bit, dropout too."""
    found, peaks = [], []
    for how in (nullcontext, _checkpointing.checkpointing_layers):
        torch.manual_seed(0)
        if name == "GIN":
            f, batch = Learned(Symmetric(N), GIN(C, 32, dropout=0.1), UniformNoise(), tau=0.1), some_graphs()
        else:
            f, batch = Learned(SYMMETRIES["S5xO3"][0], VectorNeurons(dropout=0.1), tau=0.1), many_clouds()

        def step(f=f, batch=batch, how=how):
            with how():
                g, penalties = f(batch, 64, Draws(seed=1))
            (sum(x.sum() for x in tensors(g) if x.requires_grad) + sum(penalties.values())).backward()
            return [*tensors(g), *(p.grad for p in f.parameters()), *f.buffers()]

        found.append(step())
        peaks.append(peak_memory(step, "cpu"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert peaks[1] < share * peaks[0]


@pytest.mark.parametrize("name", ["S5xO3", "flat MLP"])
def test_memory_of_inference_with_a_learned_distribution_is_flat(name, monkeypatch):
    """But for the elements themselves, and the scores in float64 that sort them."""
    if name == "flat MLP":
        learned = Learned(Symmetric(N), GIN(C, 32), UniformNoise(), tau=0.1)
        f, batch, numbers = graph_model(name, learned), some_graphs(), 32 * N * C
    else:
        f, batch, numbers = nbody("transformer"), many_clouds(), 16 * 5 * 3 * 2
        f.distribution = Learned(SYMMETRIES[name][0], VectorNeurons(width=6), tau=0.1)
    f.eval()
    monkeypatch.setattr(distribution, "AT_ONCE", 4 * numbers)  # of 4 samples

    def peak(samples: int, chunk: int | None) -> int:
        f.chunks = Chunks(chunk)
        return peak_memory(lambda: f(batch, samples), "cpu")

    with torch.no_grad():
        peak(1, None)
        few, chunked = peak(4, None), peak(64, 4)
        elements = sum(x.numel() * x.element_size() for x in tensors(f.distribution(batch, 64)[0]))
        elements += 64 * batch.size * N * 8 if name == "flat MLP" else 0
        monkeypatch.undo()
        together = peak(64, 4)
    assert chunked < 1.1 * few + elements
    assert together > 1.5 * chunked


@pytest.mark.parametrize("name", ["S5xO3", "ViT nodes"])
def test_memory_of_a_learned_distribution(name):
    """It sees all samples at once (batch statistics), so that its own memory grows with them; no more than that is added."""
    if name == "ViT nodes":
        f, batch = graph_model(name), some_graphs()
    else:
        f, batch = nbody("transformer"), many_clouds()
        f.distribution = Learned(SYMMETRIES[name][0], VectorNeurons(width=6), tau=0.1)
    few, many, chunked = peaks(f, batch)

    def alone():
        g, penalties = f.distribution(batch, 64)
        (sum(x.sum() for x in tensors(g) if x.requires_grad) + sum(penalties.values())).backward()

    distribution = peak_memory(alone, "cpu")
    gradients = sum(4 * p.numel() for p in f.parameters())
    assert chunked < 1.1 * (max(few, distribution) + gradients)
    assert chunked < 0.6 * many
