"""Distributions over group elements: uniform (GA), learned (PS), none."""

from probsym_fast.distributions.distribution import Distribution, Identity, Learned, Normal, Uniform
from probsym_fast.distributions.vector_neurons import VectorNeurons

__all__ = ["Distribution", "Identity", "Learned", "Normal", "Uniform", "VectorNeurons"]
