"""probsym_fast: probabilistic symmetrization with everything around the backbone nearly free.

    f(x) = mean over samples g ~ p(g|x) of  g . backbone(g^-1 . x)

`ops` are fused functions on tensors, `groups` act on data, `distributions` draw group elements, `models` put them around
a backbone (`Symmetrized`), and the command `probsym` trains the experiments (`pip install probsym_fast[train]`).
"""

from probsym_fast import distributions, groups, models, ops
from probsym_fast.models import Symmetrized
from probsym_fast.ops import debug
from probsym_fast.ops._info import info
from probsym_fast.profiling.measure import profile

__version__ = "0.1.0"
__all__ = ["Symmetrized", "debug", "distributions", "groups", "info", "models", "ops", "profile"]
