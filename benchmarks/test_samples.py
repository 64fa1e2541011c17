"""Memory and time against S, in chunks and all at once."""

from __future__ import annotations

import pytest

from benchmarks.harness import compare
from benchmarks.steps import steps_of
from probsym_fast._memory import peak_memory
from probsym_fast.models.chunks import Chunks

SAMPLES = 1, 4, 16, 64
CHUNKS = 16, 4
CASES = {  # configuration, changes: half the published batch where a step takes seconds
    "n-body GNN-PS": ("nbody/gnn_O3_ps", ["--training.batch=100"]),
    "n-body GNN-GA": ("nbody/gnn_O3_ga", ["--training.batch=100"]),
    "n-body Transformer-PS": ("nbody/transformer_S5xO3_ps", ["--training.batch=50"]),
    "EXP-classify MLP-PS": ("exp_classify/mlp_ps", ["--training.batch=50"]),
    "EXP-classify GIN-ID-PS": ("exp_classify/gin_ps", ["--training.batch=50"]),
    "PATTERN ViT-tiny-PS": ("pattern/small_ps", ["--training.batch=8", "--graphs.train=64"]),
}


@pytest.mark.parametrize("name", CASES)
def test_samples(name, device, seconds, record):
    """Peak memory and time of a training step, all samples at once and in chunks.

    Goals at S = 64: at most 1.1 times the peak of one chunk, and 1.4 times the time of all at once.
    """
    variants, peaks, chunked = {}, {}, {}

    def add(label: str, samples: int, size: int | None) -> None:
        model, step, _ = steps_of(*CASES[name], device, samples)
        model.chunks = Chunks(size)
        variants[label] = step
        step()  # creates the optimiser states
        model.zero_grad()  # frees the last step's gradients
        peaks[label] = peak_memory(step, device)

    for samples in SAMPLES:
        add(f"S = {samples}", samples, None)
    for size in CHUNKS:
        label = f"S = {max(SAMPLES)}, chunks of {size}"
        chunked[label] = f"S = {max(SAMPLES)}", f"S = {size}"
        add(label, max(SAMPLES), size)
    settings = {"reference": f"S = {max(SAMPLES)}", "seconds": seconds, "whole": True}
    rows = compare(f"{name}, training step", variants, device=device, **settings)
    medians = {row.variant: row.median for row in rows}
    for row in rows:
        row.extra = {"peak MB": round(peaks[row.variant] / 1e6, 1)}
        if row.variant in chunked:
            whole, one = chunked[row.variant]
            row.extra |= {
                "peak / one chunk": round(peaks[row.variant] / peaks[one], 2),
                "peak / at once": round(peaks[row.variant] / peaks[whole], 2),
                "time / at once": round(row.median / medians[whole], 2),
            }
    record(rows, variants["S = 1"])
