"""probsym_fast: probabilistic symmetrization with everything around the backbone nearly free.

    f(x) = mean over samples g ~ p(g|x) of  g . backbone(g^-1 . x)

A `Symmetrized` model puts a distribution over group elements around any backbone. `Graphs`, `PointClouds` and `Images` are
what it takes, `groups`, `distributions` and `models` hold its parts, `ops` the fused functions below them. `profile` and
`equivariance_error` measure it. The experiments (`tasks`, and the command `probsym`) need `pip install probsym_fast[train]`.
"""

from typing import TYPE_CHECKING, Any

from probsym_fast import distributions, groups, models, ops, profiling
from probsym_fast._checks import debug
from probsym_fast.batches import Batch, Graphs, Images, PointClouds
from probsym_fast.draws import Draws
from probsym_fast.exporting import export
from probsym_fast.models.chunks import Chunks
from probsym_fast.models.estimates import Estimate
from probsym_fast.models.symmetrize import symmetrize
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.ops._info import info
from probsym_fast.ops.permutation import Permutation, SoftPermutation
from probsym_fast.profiling import Profile, equivariance_error, profile

if TYPE_CHECKING:
    from probsym_fast import tasks

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Chunks",
    "Draws",
    "Estimate",
    "Graphs",
    "Images",
    "Permutation",
    "PointClouds",
    "Profile",
    "SoftPermutation",
    "Symmetrized",
    "debug",
    "distributions",
    "equivariance_error",
    "export",
    "groups",
    "info",
    "models",
    "ops",
    "profile",
    "profiling",
    "symmetrize",
    "tasks",
]


if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> Any:
        """`tasks`, imported when it is first asked for: it needs the extra `train`."""
        if name != "tasks":
            raise AttributeError(f"module 'probsym_fast' has no attribute {name!r}")
        from importlib import import_module

        try:
            return import_module("probsym_fast.tasks")
        except ModuleNotFoundError as error:
            raise ImportError(f'psf.tasks needs {error.name}: pip install "probsym_fast[train]"') from error


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
