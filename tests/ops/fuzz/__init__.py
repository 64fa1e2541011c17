"""A differential fuzzer: every op on random inputs against its float64 reference, values and every gradient.

    python -m tests.ops.fuzz --cases 100000            the ops in turn, from seed 0 on
    python -m tests.ops.fuzz --op readout --seed 17    one case again

A case is what its op and seed say: sizes 0 and 1, ties, zeros, extreme magnitudes, any layout in memory, every dtype and
padding, arguments that are refused. Refusals must be alike, too: the same kind of error from both sides.
"""

from tests.ops.fuzz.cases import CASES
from tests.ops.fuzz.comparison import failure
from tests.ops.fuzz.draws import DEVICE, Draw

__all__ = ["CASES", "DEVICE", "Draw", "failure"]
