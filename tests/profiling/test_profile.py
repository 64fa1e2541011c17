"""Profiles: what is measured, what is written, and that nothing of the model is changed."""

import json
import math
import re
import sys

import pytest
import torch
from torch import nn

import probsym_fast as psf
from probsym_fast import cli, models
from probsym_fast.distributions import GIN, Identity, Learned, Uniform, UniformNoise
from probsym_fast.groups import Euclidean, Symmetric
from probsym_fast.models.chunks import Chunks
from probsym_fast.ops import OPS
from probsym_fast.profiling.measure import variance_of
from probsym_fast.profiling.results import Row, pooled_gain, read_profiles, set_gains
from probsym_fast.profiling.steps import bare_backbone
from probsym_fast.profiling.tracing import trace
from tests.helpers.graphs import random_graphs
from tests.models.test_symmetrized import clouds

N = 9
PAIRS = ["--dataset=wl_pairs", "--training.batch=4", "--distribution.width=8"]


def model(distribution=None) -> psf.Symmetrized:
    torch.manual_seed(0)
    parts = models.MLP([16, 256, 3]), models.FlatGraph(N, 16, 2), models.MeanReadout()
    return psf.Symmetrized(*parts, distribution or Learned(Symmetric(N), GIN(2, 8), UniformNoise(), tau=0.1))


def graphs():
    return random_graphs([3, 1, 9, 5], dtype=torch.float32)


def clouds_model() -> psf.Symmetrized:
    torch.manual_seed(0)
    parts = models.MessagePassing(width=8, layers=1), models.NodeVectors(), models.NodeReadout(displacement=True)
    return psf.Symmetrized(*parts, Uniform(Euclidean(3)))


def test_rows_of_a_model(tmp_path):
    f = model(Uniform(Symmetric(N)))
    f.chunks = Chunks(3)
    found = psf.profile(f, graphs(), samples=(1, 4, 32), chunks=(None, 2), seconds=0.01, repeats=200)
    assert len(found.rows) == 12 and found.batch == 4
    assert [(r.mode, r.chunk, r.samples) for r in found.rows[:4]] == [
        ("training", None, 1),
        ("training", None, 4),
        ("training", None, 32),
        ("training", 2, 1),
    ]
    for row in found.rows:
        assert 0 < row.low <= row.latency <= row.high and row.peak > 0 and row.tax > 0
        assert row.throughput == pytest.approx(4 / row.latency)
        assert (row.variance is not None) == (row.mode == "inference") == (row.error is not None)
    some = {(r.mode, r.chunk, r.samples): r for r in found.rows}
    assert some["training", None, 32].peak > 1.5 * some["training", 2, 32].peak
    for chunk in (None, 2):  # the variance of a mean of independent samples
        one, many = (some["inference", chunk, s].variance for s in (1, 32))
        assert 32 * 0.6 < one / many < 32 / 0.6  # of 12 outputs over 200 repeats: 10 % each, less where they depend
    found.save(tmp_path / "a" / "profile.json")
    assert json.loads((tmp_path / "a" / "profile.json").read_text())["rows"][3]["chunk"] == 2
    for ending, begins in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        found.plot(tmp_path / f"profile.{ending}")
        assert (tmp_path / f"profile.{ending}").read_bytes().startswith(begins)
    lines = found.table().splitlines()
    assert len(lines) == 13 and "inference" in lines[-1] and re.search(r"\btax\b", lines[0])


def test_backends_are_those_asked_for(monkeypatch):
    called = []
    for name in ("soft_permutation", "embed"):
        reference = OPS[name].reference
        monkeypatch.setattr(OPS[name], "reference", lambda *x, r=reference, n=name: called.append(n) or r(*x))
    batch, f = graphs(), model()
    psf.profile(f, batch, samples=[2], modes=["inference"], backends=["reference"], seconds=0.001)
    assert set(called) == {"soft_permutation", "embed"}
    called.clear()
    with torch.no_grad(), psf.ops.using_backend("reference"):
        by_reference, _ = f(batch, 2, torch.Generator().manual_seed(1))
    assert called
    if len(OPS["embed"].backends("cpu")) > 1:
        called.clear()
        with torch.no_grad():
            torch.testing.assert_close(f(batch, 2, torch.Generator().manual_seed(1))[0], by_reference)
        assert not called
    with psf.ops.using_backend("triton"), pytest.raises(RuntimeError, match=r"backend must be one of .* got 'triton'"):
        f(batch, 2)
    with (
        pytest.raises(ValueError, match=r"using_backend: name must be one of .* got 'fast'"),
        psf.ops.using_backend("fast"),
    ):
        pass


class Hungry(nn.Module):
    """Lacks memory for more than 2 samples; in_backward: in the backward pass."""

    def __init__(self, then: nn.Module | None = None):
        super().__init__()
        self.then, self.in_backward = then or nn.Identity(), False

    def forward(self, x):
        y = self.then(x)
        if x.shape[1] > 2 and not self.in_backward:
            self.ends()
        if x.shape[1] > 2 and y.requires_grad:
            y.register_hook(self.ends)
        return y

    def ends(self, *_):
        raise torch.OutOfMemoryError


def test_rows_that_run_out_of_memory_are_empty(tmp_path):
    f = model(Uniform(Symmetric(N)))
    f.backbone = Hungry()
    found = psf.profile(f, graphs(), samples=(2, 4), chunks=(None, 2), modes=("training",), seconds=0.001)
    assert f.draws == "independent"
    assert [row.latency is None for row in found.rows] == [False, True, False, False]
    assert [row.at_once for row in found.rows] == [2, None, 2, 2]
    assert "out of memory" in found.table().splitlines()[2]
    found.plot(tmp_path / "profile.png")


def test_auto_chunks_are_those_of_the_bare_backbone_too():
    """Memory ends above 2 samples: found in the first step, before the bare backbone runs."""
    f = model(Uniform(Symmetric(N)))
    f.backbone = Hungry(f.backbone)
    for mode in ("training", "inference"):
        with pytest.warns(
            UserWarning, match="out of memory with (7 samples at once; 4|4 samples at once; 2) from now on"
        ):
            (row,) = psf.profile(f, graphs(), samples=[7], chunks=["auto"], modes=[mode], seconds=0.001).rows
        assert row.latency > 0 and row.tax > 0 and (row.chunk, row.at_once) == ("auto", 2)
    f.backbone.in_backward = True
    with pytest.warns(UserWarning, match="out of memory with (7 samples at once; 4|4 samples at once; 2) from now on"):
        (row,) = psf.profile(f, graphs(), samples=[7], chunks=["auto"], modes=["training"], seconds=0.001).rows
    assert row.latency > 0 and row.at_once == 2


def test_chunks_are_the_models_unless_given():
    f = model()
    f.chunks = Chunks("auto", memory=10**9)
    (row,) = psf.profile(f, graphs(), samples=[2], modes=["inference"], seconds=0.001).rows
    assert row.chunk == "auto" and f.chunks.memory == 10**9
    f.chunks = Chunks("auto", memory=1)
    seen = []
    f.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    found = psf.profile(f, graphs(), samples=[4], chunks=["auto"], modes=["inference"], seconds=0.001)
    (row,) = found.rows
    assert set(seen) == {1}  # within the model's limit
    assert row.at_once == 1 and "auto (1)" in found.table() and json.loads(found.json())["rows"][0]["at_once"] == 1
    seen.clear()
    psf.profile(f, graphs(), samples=[4], chunks=[None], modes=["inference"], seconds=0.001)
    assert set(seen) == {4}


def test_predictions_without_noise_and_rows_without_figures_are_plotted(tmp_path):
    f = model(Identity(Symmetric(N)))
    found = psf.profile(f, graphs(), samples=(1, 2), modes=["inference"], seconds=0.001)
    assert [row.variance for row in found.rows] == [0, 0]
    found.plot(tmp_path / "zero.png")
    for row in found.rows:
        row.clear()
    found.plot(tmp_path / "none.png")
    for name in ("zero", "none"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_kinds_of_draws(tmp_path):
    f, kinds = clouds_model(), ("independent", "antithetic")
    batch = clouds(3, torch.float32)
    found = psf.profile(f, batch, samples=(2, 8), draws=kinds, modes=["inference"], seconds=0.001)
    assert [(row.draws, row.samples) for row in found.rows] == [(kind, s) for kind in kinds for s in (2, 8)]
    assert f.draws == "independent"
    assert found.rows[2].variance < 0.3 * found.rows[0].variance  # new weights give outputs that are nearly constant
    found.plot(tmp_path / "profile.png")
    with pytest.raises(ValueError, match="profile: each of draws must be one of"):
        psf.profile(f, batch, draws=["mirrored"])


def test_variance_alone_is_that_of_inference():
    f = model(Uniform(Symmetric(N)))
    alone, timed = (
        psf.profile(f, graphs(), samples=[2], modes=[mode], seconds=0.001, repeats=500).rows[0]
        for mode in ("variance", "inference")
    )
    assert alone.latency is alone.peak is alone.tax is None and timed.latency > 0
    assert abs(alone.variance - timed.variance) < 5 * math.hypot(alone.error, timed.error)


def test_variance_and_its_error():
    """Of (8, 5) entries that are N(0, 4) along one axis and depend on each other along the other: 2 chi^2 / 8 each."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        x = 2 * torch.randn(40, 8, 1, generator=generator).expand(40, 8, 5)
        found.append(variance_of(list(x)))
    values, errors = torch.tensor(found).T
    assert values.mean().item() == pytest.approx(4, rel=0.02)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)
    assert values.std().item() == pytest.approx(4 * (2 / (8 * 39)) ** 0.5, rel=0.15)
    value, error = variance_of([torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])])
    assert value == 1 and error is None  # (2 + 0) / 2


def test_gains_are_over_independent_draws_of_the_same_case():
    def row(chunk, draws, samples, variance, error):
        return Row("variance", "auto", chunk, draws, samples, variance=variance, error=error)

    rows = [row(1, "independent", 2, 6.0, 0.6), row(1, "antithetic", 2, 2.0, 0.0), row(1, "antithetic", 4, 1.0, 0.1)]
    rows += [row(2, "independent", 2, 8.0, 0.4), row(2, "stratified", 2, 2.0, 0.15), row(2, "antithetic", 2, 0.0, 0.0)]
    set_gains(rows)
    assert [r.gain for r in rows] == [None, 3.0, None, None, 4.0, None]
    assert rows[1].gain_error == pytest.approx(0.3)
    assert rows[4].gain_error == pytest.approx(4 * (0.05**2 + 0.075**2) ** 0.5)
    rows = [row(1, "independent", 2, 6.0, None), row(1, "antithetic", 2, 2.0, 0.1)]
    set_gains(rows)
    assert rows[1].gain == 3 and rows[1].gain_error is None and pooled_gain(rows[1:]) is None


def test_gains_are_pooled_over_whole_blocks():
    rows = [Row("variance", "auto", None, "stratified", s, gain=g, gain_error=e) for s, g, e in
            ((4, 0.1, 0.001), (8, 2.0, 0.2), (16, 4.0, 0.4), (64, None, None))]  # fmt: skip
    gain, error = pooled_gain(rows)
    assert gain == pytest.approx(8**0.5) and error == pytest.approx(8**0.5 * 0.1 / 2**0.5)
    rows[1].gain_error = 1e-6
    assert pooled_gain(rows)[0] == pytest.approx(2, rel=1e-4)
    assert pooled_gain(rows[:1]) is None
    rows[0].draws = "antithetic"
    assert pooled_gain(rows[:1]) == pytest.approx((0.1, 0.001))


def test_bare_backbone_does_what_the_model_does_without_symmetry():
    f = model()
    f.chunks = Chunks(3)
    backbone, parts = bare_backbone(f, graphs(), 7)
    assert [count for _, count in parts] == [3, 3, 1]
    assert [x.shape for ((x,), _), _ in parts] == [(4, count, N * N + 2 * N) for count in (3, 3, 1)]
    assert backbone(*parts[0][0][0]).shape == (4, 3, 3)


def test_rows_are_kept_where_a_profile_is_ended(tmp_path, capsys, monkeypatch):
    f, path = model(), tmp_path / "profile.json"

    def interrupt(_, inputs):
        if inputs[0].shape[1] == 4:
            raise KeyboardInterrupt

    handle = f.backbone.register_forward_pre_hook(interrupt)
    settings = {"modes": ["variance"], "repeats": 3, "path": path, "draws": ["independent", "antithetic"]}
    with pytest.raises(KeyboardInterrupt):
        psf.profile(f, graphs(), samples=[4], **settings)
    assert not path.exists() and "ended early" not in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        psf.profile(f, graphs(), samples=[1, 2, 4], **settings)
    (kept,) = read_profiles(path)
    assert [row.samples for row in kept.rows] == [1, 2] and all(row.variance > 0 for row in kept.rows)
    assert f"profile model: ended early; 2 of 6 rows are in {path}" in capsys.readouterr().err
    handle.remove()
    found = psf.profile(f, graphs(), samples=[1, 2, 4], **settings)
    assert read_profiles(path) == [found] and found.rows[-1].gain > 0
    assert [x.name for x in tmp_path.iterdir()] == ["profile.json"]
    measure = sys.modules["probsym_fast.profiling.measure"].measure

    def stopped(row, *rest):
        if row.samples == 2:
            raise KeyboardInterrupt
        measure(row, *rest)

    monkeypatch.setattr(sys.modules["probsym_fast.profiling.measure"], "measure", stopped)
    arguments = [
        "profile",
        "-c",
        "exp_classify/gin_ps",
        "--samples",
        "1",
        "2",
        "--modes",
        "variance",
        "--device",
        "cpu",
    ]
    assert cli.main([*arguments, "--output", str(tmp_path / "out"), *PAIRS]) == 130
    told = capsys.readouterr().err
    assert f"ended early; 1 of 2 rows are in {tmp_path / 'out' / 'profile.json'}" in told and "interrupted" in told
    assert len(read_profiles(tmp_path / "out" / "profile.json")[0].rows) == 1


def test_trace_names_ops_and_parts(tmp_path):
    for backend in ("auto", "reference"):
        path = tmp_path / backend / "trace.json"
        with psf.ops.using_backend(backend):
            trace(model(), graphs(), path=path, samples=2)
        names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
        assert {f"Symmetrized.{part}" for part in ("distribution", "embed", "backbone", "readout")} <= names
        for op in ("soft_permutation", "permutation_entropy", "aggregate", "embed"):
            assert names & {f"probsym_fast::{op}", f"probsym_fast::{op} (reference)"}, op
        assert [x.name for x in path.parent.iterdir()] == ["trace.json"]
    assert not any("under_name" in op.reference.__qualname__ for op in OPS.values())


@pytest.mark.parametrize("look", ["training", "inference", "trace"])
def test_the_model_is_as_it_was(tmp_path, look):
    f, batch = model(), graphs()
    f.chunks, f.draws = chunks, _ = Chunks("auto", memory=10**9), "antithetic"
    f.backbone.eval()
    f(batch, 2)[0].square().mean().backward()
    modes = {name: part.training for name, part in f.named_modules()}
    weights = {name: x.clone() for name, x in f.state_dict().items()}
    gradients = {name: p.grad for name, p in f.named_parameters()}
    values = {name: x.clone() for name, x in gradients.items() if x is not None}
    if look == "trace":
        trace(f, batch, path=tmp_path / "trace.json", samples=2, chunk=1, draws="independent")
    else:
        psf.profile(f, batch, samples=[2], modes=[look], chunks=[1], draws=["independent"], seconds=0.001)
    assert f.chunks is chunks and f.draws == "antithetic"
    assert modes == {name: part.training for name, part in f.named_modules()} and set(modes.values()) == {True, False}
    for name, x in f.state_dict().items():
        assert torch.equal(x, weights[name]), name
    assert values and all(p.grad is gradients[name] for name, p in f.named_parameters())
    assert all(torch.equal(gradients[name], value) for name, value in values.items())


def test_trace_is_of_what_it_is_told(tmp_path):
    f, seen = model(), []
    f.backbone.register_forward_pre_hook(lambda _, x: seen.append((x[0].shape[1], f.draws)))
    path = tmp_path / "trace.json"
    trace(f, graphs(), path=path, samples=6, chunk=2, draws="antithetic", backend="reference")
    assert set(seen) == {(2, "antithetic")}
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert "probsym_fast::embed (reference)" in names and "probsym_fast::embed" not in names
    for bad, message in (
        ({"chunk": 0}, "size"),
        ({"draws": "x"}, "each of draws"),
        ({"backend": "x"}, "backends"),
        ({"samples": 0}, "samples"),
    ):
        with pytest.raises(ValueError, match=f"{message} must be"):
            trace(f, graphs(), path=path, **bad)


def test_bad_arguments():
    f, batch = model(), graphs()
    with pytest.raises(TypeError, match="profile: batch must be given with a model, got None"):
        psf.profile(f)
    with pytest.raises(
        ValueError, match=r"profile: modes must be of \('training', 'inference', 'variance'\), got 'test'"
    ):
        psf.profile(f, batch, modes=["test"])
    with pytest.raises(ValueError, match="profile: each of chunks must be an int >= 1, None or 'auto', got 0"):
        psf.profile(f, batch, chunks=[None, 0])
    with pytest.raises(ValueError, match=r"profile: device must be one of \('cpu',.*\), got 'meta'"):
        psf.profile(f, batch, device="meta")
    with pytest.raises(ValueError, match="profile: repeats must be at least 2, got 1"):
        psf.profile(f, batch, repeats=1)


LISTS = [
    ({"samples": 4}, "samples must be a list of ints, got 4"),
    ({"samples": "4"}, "samples must be a list of ints, got '4'"),
    ({"samples": [2.0]}, "samples must be an int, got float 2.0"),
    ({"samples": None}, "samples must be a list of ints, got None"),
    ({"chunks": 4}, "chunks must be a list of ints, 'auto' and None, got 4"),
    ({"chunks": "auto"}, "chunks must be a list of ints, 'auto' and None, got 'auto'"),
    ({"modes": "training"}, "modes must be a list of strings, got 'training'"),
    ({"modes": [3]}, r"modes must be a list of strings, got \[3\]"),
    ({"draws": "antithetic"}, "draws must be a list of strings, got 'antithetic'"),
    ({"backends": "cpu"}, "backends must be a list of strings, got 'cpu'"),
    ({"seconds": "1"}, "seconds must be a number, got '1'"),
    ({"seconds": None}, "seconds must be a number, got None"),
]


@pytest.mark.parametrize(("settings", "message"), LISTS)
def test_values_of_other_types_are_refused(settings, message):
    with pytest.raises(TypeError, match=f"^profile: {message}$"):
        psf.profile(model(), graphs(), **settings)


@pytest.mark.parametrize("name", ["samples", "chunks", "modes", "draws", "backends"])
def test_empty_lists_are_refused(name):
    with pytest.raises(ValueError, match=rf"^profile: {name} must hold one value or more, got \[\]$"):
        psf.profile(model(), graphs(), **{name: []})


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan])
def test_seconds_are_finite_and_positive(seconds):
    with pytest.raises(ValueError, match=f"^profile: seconds must be finite and > 0, got {seconds}$"):
        psf.profile(model(), graphs(), seconds=seconds)
