"""Costs and benefits of samples: profiles of throughput, memory and variance; traces of a step; equivariance errors."""

from probsym_fast.profiling.equivariance import equivariance_error
from probsym_fast.profiling.measure import profile
from probsym_fast.profiling.results import Profile
from probsym_fast.profiling.tracing import trace

__all__ = ["Profile", "equivariance_error", "profile", "trace"]
