"""Distributions over group elements: uniform (GA), learned (PS), a predefined frame (FA), the identity."""

from probsym_fast.distributions.distribution import (
    Distribution,
    Frame,
    Identity,
    Learned,
    Noise,
    Normal,
    Uniform,
    UniformNoise,
)
from probsym_fast.distributions.gin import GIN
from probsym_fast.distributions.vector_neurons import VectorNeurons

__all__ = [
    "GIN",
    "Distribution",
    "Frame",
    "Identity",
    "Learned",
    "Noise",
    "Normal",
    "Uniform",
    "UniformNoise",
    "VectorNeurons",
]
