"""Peak memory of chunks and of layers that are computed again, by every allocation there is."""

from contextlib import nullcontext

import pytest
import torch

from probsym_fast import Symmetrized, _checkpointing, models
from probsym_fast._memory import peak_memory
from probsym_fast.distributions import GIN, Learned, Uniform, UniformNoise, VectorNeurons, distribution
from probsym_fast.groups import Draws, Euclidean, Symmetric
from probsym_fast.groups.elements import tensors
from probsym_fast.models.chunks import MARGIN, Chunks
from probsym_fast.ops import OPS
from tests.helpers.chunked import C, N, graph_model
from tests.helpers.graphs import random_graphs
from tests.models.test_symmetrized import SYMMETRIES, clouds


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
    assert 1.3 * few < again  # so that the last case below has too little for all samples either way
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

    def of_the_distribution():
        g, penalties = f.distribution(batch, 64)
        (sum(x.sum() for x in tensors(g) if x.requires_grad) + sum(penalties.values())).backward()

    distribution = peak_memory(of_the_distribution, "cpu")
    gradients = sum(4 * p.numel() for p in f.parameters())
    assert chunked < 1.1 * (max(few, distribution) + gradients)
    assert chunked < 0.6 * many
