"""Data sets: loaders and generators. Generated and downloaded files are kept under `cache_dir()`.

Nothing here imports torch_geometric until it makes the first graph.
"""

from probsym_fast.data._store import cache_dir
from probsym_fast.data.digits import digits
from probsym_fast.data.dynamics import Conformations, dynamics, g2
from probsym_fast.data.exp import exp, read_exp
from probsym_fast.data.graph6 import read_g6, write_g6
from probsym_fast.data.graph8c import graph8c
from probsym_fast.data.lrgb import lrgb
from probsym_fast.data.molecules import MolecularGraphs, molecules
from probsym_fast.data.nbody import NBody
from probsym_fast.data.pattern import pattern, published_pattern
from probsym_fast.data.wl_pairs import wl_colors, wl_equivalent, wl_pairs

__all__ = [
    "Conformations",
    "MolecularGraphs",
    "NBody",
    "cache_dir",
    "digits",
    "dynamics",
    "exp",
    "g2",
    "graph8c",
    "lrgb",
    "molecules",
    "pattern",
    "published_pattern",
    "read_exp",
    "read_g6",
    "wl_colors",
    "wl_equivalent",
    "wl_pairs",
    "write_g6",
]
