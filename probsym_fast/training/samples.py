"""How many group elements a graph: the keys below `samples` of a configuration, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from probsym_fast.training.configuration import COUNT, POSITIVE, Limit

SAMPLES_LIMITS = {
    **{f"samples.{key}": COUNT for key in ("train", "valid", "test", "trials")},
    "samples.chunk": Limit('at least 1, "auto" or null', lambda x: x == "auto" or (not isinstance(x, str) and x >= 1)),
    "samples.memory": POSITIVE,
}


@dataclass
class Samples:
    """Group elements a graph.

    Args:
        train: in training.
        valid: in validation.
        test: in the test.
        trials: times the test is repeated with other noise.
        draws: "independent" noise, "antithetic" pairs z and -z, or "stratified" rotations too.
        chunk: how many run at once, whose memory is then all that is taken; null: all; "auto": all where they fit, else the
            most that do, found by measuring (not with training.strategy fsdp).
        memory: GB that the samples at once may take with "auto"; null: what the GPU has (on a CPU: any).
    """

    train: int = 20
    valid: int = 20
    test: int = 20
    trials: int = 5
    draws: Literal["independent", "antithetic", "stratified"] = "independent"
    chunk: int | str | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and self.chunk != "auto":
            raise ValueError(f"config: samples.memory must be null unless samples.chunk is auto, got {self.memory}")

    def settings(self) -> dict[str, Any]:
        """The arguments of `Symmetrized`."""
        memory = None if self.memory is None else round(self.memory * 1e9)
        return {"draws": self.draws, "chunk": self.chunk, "memory": memory}
