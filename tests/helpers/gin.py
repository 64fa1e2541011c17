"""The learned distribution on graphs that the tests share."""

import torch
from torch import nn

from probsym_fast.distributions import GIN, Learned, UniformNoise
from probsym_fast.groups import Symmetric

N, S, C = 7, 3, 2
SIZES = [3, 1, 7, 5]  # nodes of graphs


def network(dtype=torch.float64, **settings) -> GIN:
    """With statistics and affine maps as after some training."""
    net = GIN(C, 8, **settings).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def learned(noise=None, dtype=torch.float64, slots=N, **settings) -> Learned:
    return Learned(Symmetric(slots), network(dtype, **settings), noise or UniformNoise()).eval()
