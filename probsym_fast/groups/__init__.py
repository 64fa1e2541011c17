"""Groups: elements in compact form, composition, uniform sampling, and how they act on data."""

from probsym_fast.batches import Batch, Graphs, Images, PointClouds
from probsym_fast.draws import Draws
from probsym_fast.groups.elements import narrow
from probsym_fast.groups.euclidean import Euclidean, Motion, SpecialEuclidean, Translation
from probsym_fast.groups.finite import Cyclic, Dihedral, Finite
from probsym_fast.groups.group import Group, Product
from probsym_fast.groups.images import move_images, plane_of
from probsym_fast.groups.lorentz import Lorentz
from probsym_fast.groups.orthogonal import Orthogonal, SpecialOrthogonal
from probsym_fast.groups.symmetric import Symmetric
from probsym_fast.groups.unitary import Unitary

__all__ = [
    "Batch",
    "Cyclic",
    "Dihedral",
    "Draws",
    "Euclidean",
    "Finite",
    "Graphs",
    "Group",
    "Images",
    "Lorentz",
    "Motion",
    "Orthogonal",
    "PointClouds",
    "Product",
    "SpecialEuclidean",
    "SpecialOrthogonal",
    "Symmetric",
    "Translation",
    "Unitary",
    "move_images",
    "narrow",
    "plane_of",
]
