"""Data sets: loaders and generators. Whatever is generated is kept under `cache_dir()`."""

from probsym_fast.data._store import cache_dir
from probsym_fast.data.nbody import NBody

__all__ = ["NBody", "cache_dir"]
