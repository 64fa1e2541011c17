"""Distributions over group elements: uniform (GA), learned (PS), energies, predefined frames (FA), orbits, the identity."""

from probsym_fast.distributions.discrete import Discrete
from probsym_fast.distributions.distribution import (
    Distribution,
    Identity,
    Learned,
    Noise,
    Normal,
    Orbit,
    Uniform,
    UniformNoise,
)
from probsym_fast.distributions.energy import Energy
from probsym_fast.distributions.frames import Frame
from probsym_fast.distributions.gin import GIN
from probsym_fast.distributions.laplacian import laplacian_keys
from probsym_fast.distributions.minimal_frames import MinimalFrame
from probsym_fast.distributions.rotation_energy import RotationEnergy
from probsym_fast.distributions.vector_neurons import VectorNeurons
from probsym_fast.distributions.weighted_frames import WeightedFrame

__all__ = [
    "GIN",
    "Discrete",
    "Distribution",
    "Energy",
    "Frame",
    "Identity",
    "Learned",
    "MinimalFrame",
    "Noise",
    "Normal",
    "Orbit",
    "RotationEnergy",
    "Uniform",
    "UniformNoise",
    "VectorNeurons",
    "WeightedFrame",
    "laplacian_keys",
]
