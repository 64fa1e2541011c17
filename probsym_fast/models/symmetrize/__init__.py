"""A symmetrized model in one call."""

from probsym_fast.models.symmetrize.call import symmetrize
from probsym_fast.models.symmetrize.networks import EncoderOnNodes, takes_edges

__all__ = ["EncoderOnNodes", "symmetrize", "takes_edges"]
