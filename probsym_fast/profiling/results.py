"""Results of a profile: its rows, and their table, JSON and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from probsym_fast._files import write_atomically
from probsym_fast.draws import check_kind

FIGURES = ("at_once", "latency", "low", "high", "throughput", "peak", "tax", "variance", "error", "gain", "gain_error")
NEW, OWN = "new", "the model's"
WHOLE = {"antithetic": 2, "stratified": 8}  # samples per block, in up to three dimensions


@dataclass
class Row:
    """Figures for one number of samples S, mode, backend, chunk and kind of draws; None where not measured.

    at_once: samples per pass; with chunk "auto" the number found to fit.
    path: how a backbone that can run in one pass ran: "one pass", or "modules: " and the reason; None for other backbones.
    latency: median seconds per step (low, high: quartiles).
    throughput: graphs per second; sampled graphs are S times as many.
    peak: bytes of a step beyond model and batch.
    tax: latency over that of the bare backbone, timed in turn.
    variance: variance of the prediction over the noise, averaged over entries (error: its standard error, None for two
        predictions).
    gain: variance with independent draws over this variance, all else equal (gain_error: its standard error).
    """

    mode: str
    backend: str
    chunk: int | str | None
    draws: str
    samples: int
    at_once: int | None = None
    path: str | None = None
    latency: float | None = None
    low: float | None = None
    high: float | None = None
    throughput: float | None = None
    peak: int | None = None
    tax: float | None = None
    variance: float | None = None
    error: float | None = None
    gain: float | None = None
    gain_error: float | None = None

    @property
    def case(self) -> tuple:
        """What rows have in common that differ only in their draws."""
        return self.mode, self.backend, self.chunk, self.samples

    def clear(self) -> None:
        """Removes all figures."""
        for name in FIGURES:
            setattr(self, name, None)


@dataclass
class Profile:
    """Result of `profile`. weights: path of the checkpoint, NEW for a task without one, OWN for a given model."""

    name: str
    batch: int
    machine: dict[str, Any]
    rows: list[Row]
    weights: str
    repeats: int

    def state(self) -> str:
        """The weights in a word or two."""
        return {NEW: "new weights", OWN: "own weights"}.get(self.weights, "trained")

    def table(self) -> str:
        """Plain text, one line per row."""
        head = (
            "mode",
            "backend",
            "chunk",
            "draws",
            "S",
            "ms",
            "graphs/s",
            "peak MB",
            "tax",
            "variance",
            "gain",
            "backbone",
        )
        lines = [head, *(cells(row) for row in self.rows)]
        return aligned(lines, str.rjust)

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        write_atomically(Path(path), lambda file: file.write(self.json().encode()))

    def plot(self, path: str | Path) -> None:
        """Plots every quantity against S to a .png, .pdf or .svg file (needs matplotlib)."""
        from probsym_fast.profiling.plots import plot_profile

        weights = self.state() if self.weights in (NEW, OWN) else "/".join(Path(self.weights).parts[-3:])
        plot_profile(Path(path), f"{self.name}\n{weights}", [asdict(row) for row in self.rows])


def set_gains(rows: Sequence[Row]) -> None:
    """Fills gain and gain_error of rows with a counterpart that has independent draws.

    The two variances come from independent noise, so the squares of their relative errors add up. The gain has an error only
    if both variances have one.
    """
    independent = {row.case: row for row in rows if row.draws == "independent" and row.variance}
    for row in rows:
        base = independent.get(row.case)
        if base is None or base is row or not row.variance:
            continue
        assert base.variance is not None
        row.gain = base.variance / row.variance
        if base.error is not None and row.error is not None:
            row.gain_error = row.gain * math.hypot(base.error / base.variance, row.error / row.variance)


def read_profiles(path: str | Path) -> list[Profile]:
    """The profiles in a JSON file that `Profile.save` or `save_profiles` wrote.

    Raises FileNotFoundError if it is missing, and ValueError, naming the file, if it holds no profile.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"profile: {path} must exist, found nothing there")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        some = [read_profile(one) for one in (found if isinstance(found, list) else [found])]
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"profile: {path} must hold a profile, got {type(error).__name__}: {error}") from error
    if not some:
        raise ValueError(f"profile: {path} must hold a profile, got an empty list")
    return some


def read_profile(values: Any) -> Profile:
    """A profile from the content of its JSON. Raises TypeError, ValueError or LookupError for other content."""
    if not isinstance(values, dict):
        raise TypeError(f"expected keys and values, got {type(values).__name__}")
    found = Profile(**{**values, "rows": [Row(**row) for row in values["rows"]]})
    hints = get_type_hints(Row)
    for row in found.rows:
        check_kind("row", row.draws)
        for name, value in asdict(row).items():
            if not isinstance(value, hints[name]):
                raise TypeError(f"{name} of a row must be {hints[name]}, got {value!r}")
    return found


def save_profiles(path: str | Path, profiles: Sequence[Profile]) -> None:
    """Writes several profiles to one JSON file, as a list of what `Profile.save` writes."""
    text = json.dumps([asdict(one) for one in profiles], indent=1)
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def joined(profiles: Sequence[Profile]) -> list[Profile]:
    """The profiles, with only their rows that have a variance.

    Raises ValueError for a profile without such rows, or whose rows differ in more than draws and S.
    """
    found = []
    for one in profiles:
        rows = [row for row in one.rows if row.variance is not None]
        if len({row.case[:-1] for row in rows}) != 1:
            cases = sorted({" ".join(map(str, row.case[:-1])) for row in rows})
            raise ValueError(f"profile: {one.name} must have variances of one mode, backend and chunk, got {cases}")
        found.append(replace(one, rows=rows))
    return found


def pooled_gain(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The pooled gain of rows that differ only in S, and its standard error: a mean of logarithms, weighted by their errors.

    Uses rows whose S is a multiple of the block size: blocks are independent, so the gain does not depend on their number.
    With pairs the gain is 1 / (1 + rho), where rho correlates the predictions of a sample and its mirror image. None if no
    such row has a gain with an error.
    """
    some = [(r.gain, r.gain_error) for r in rows if r.gain and r.gain_error and r.samples % WHOLE[r.draws] == 0]
    if not some:
        return None
    weights = [(gain / error) ** 2 for gain, error in some]
    gain = math.exp(sum(w * math.log(one) for w, (one, _) in zip(weights, some, strict=True)) / sum(weights))
    return gain, gain / math.sqrt(sum(weights))


def gains_table(profiles: Sequence[Profile]) -> str:
    """The gains as plain text: a line per profile and kind of draws other than independent, a column per S.

    The last column is the `pooled_gain`.
    """
    samples = sorted({row.samples for one in profiles for row in one.rows})
    lines = [("experiment", "weights", "draws", *(f"S = {s}" for s in samples), "pooled")]
    for one in profiles:
        for kind in dict.fromkeys(row.draws for row in one.rows if row.gain is not None):
            gains = {row.samples: row for row in one.rows if row.draws == kind}
            some = [with_error(gains[s].gain, gains[s].gain_error, ".3g") if s in gains else "-" for s in samples]
            gain, error = pooled_gain(list(gains.values())) or (None, None)
            lines.append((one.name, one.state(), kind, *some, with_error(gain, error, ".3g")))
    return aligned(lines, str.ljust)


def aligned(lines: Sequence[Sequence[str]], justify: Callable[[str, int], str]) -> str:
    """The lines, padded to columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(justify, line, widths)).rstrip() for line in lines)


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(value * scale, form)


def with_error(value: float | None, error: float | None, form: str) -> str:
    return number(value, form) if error is None else f"{number(value, form)} +- {number(error, '.1g')}"


def chunk_cell(row: Row) -> str:
    found = f" ({row.at_once})" if row.chunk == "auto" and row.at_once is not None else ""
    return "all" if row.chunk is None else f"{row.chunk}{found}"


def cells(row: Row) -> tuple[str, ...]:
    empty = all(getattr(row, name) is None for name in FIGURES)
    return (
        row.mode,
        row.backend,
        chunk_cell(row),
        row.draws,
        str(row.samples),
        "out of memory" if empty else number(row.latency, ".3g", 1e3),
        number(row.throughput, ".4g"),
        number(row.peak, ".4g", 1e-6),
        number(row.tax, ".2f"),
        with_error(row.variance, row.error, ".2e"),
        with_error(row.gain, row.gain_error, ".3g"),
        row.path or "",
    )
