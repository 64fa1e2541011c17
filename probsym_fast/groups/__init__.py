"""Groups: elements in compact form, composition, uniform sampling, and how they act on data."""

from probsym_fast.batches import Batch, Graphs, PointClouds
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import narrow
from probsym_fast.groups.euclidean import Euclidean, Motion, SpecialEuclidean, Translation
from probsym_fast.groups.group import Group, Product
from probsym_fast.groups.orthogonal import Orthogonal, SpecialOrthogonal
from probsym_fast.groups.symmetric import Symmetric

__all__ = [
    "Batch",
    "Draws",
    "Euclidean",
    "Graphs",
    "Group",
    "Motion",
    "Orthogonal",
    "PointClouds",
    "Product",
    "SpecialEuclidean",
    "SpecialOrthogonal",
    "Symmetric",
    "Translation",
    "narrow",
]
