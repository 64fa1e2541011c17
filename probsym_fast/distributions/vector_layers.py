"""The layers of Vector Neurons: parameters around the steps of `vector_steps`, which explains the axes.

They compute in the dtype of their inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from probsym_fast._autocast import promoted
from probsym_fast.distributions._statistics import move_statistics
from probsym_fast.distributions.vector_steps import EdgeActivation, NormMoments, PairNormMoments, VectorActivation
from probsym_fast.ops.reference.vector_edge_convolution import (
    VARIANCE_EPS,
    linear,
    nearest,
    node_maps,
    norm_moments,
    valid,
)
from probsym_fast.ops.vector_edge_convolution import OP, beyond_kernels, vector_edge_convolution

MOMENTUM = 0.1  # of the running statistics


def uniform(*shape: int) -> Tensor:
    """Weights drawn as in nn.Linear."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(shape[-1])


class Norm(nn.Module):
    """Batch normalisation of the vectors' norms, as (scale, shift): |p| becomes scale |p| + shift."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, p: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """p (w, d, ...) -> scale, shift (w,). inside (...): whose norms count; None: all."""
        if not (self.training and p.numel()):
            return self._scaling(None, 0, p.dtype)
        if inside is None:
            return self._scaling(NormMoments.of(p), p[0, 0].numel(), p.dtype)
        return self._scaling(norm_moments(p, inside), inside.sum().to(p.dtype), p.dtype)

    def of_pairs(self, near: Tensor, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Arguments as of `PairNormMoments`."""
        moments = PairNormMoments.of(near, weight, x) if self.training and x.numel() else None
        return self._scaling(moments, near.sum() if moments else 0, x.dtype)

    def _scaling(
        self, moments: tuple[Tensor, Tensor] | None, count: Tensor | int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """moments None: the running statistics."""
        mean, variance = moments or (self.running_mean.to(dtype), self.running_var.to(dtype))
        if moments:
            self.move(mean, variance, count)
        scale = self.weight.to(dtype) * (variance + VARIANCE_EPS).rsqrt()
        return scale, self.bias.to(dtype) - scale * mean

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor, count: Tensor | int) -> None:
        """The running statistics towards those of `count` values."""
        finite = (mean + variance).isfinite()  # NaN and infinity would stay in the statistics forever
        unbiased = variance * (count / (count - 1))
        seen = (torch.where(finite, mean, self.running_mean), torch.where(finite, unbiased, self.running_var))
        move_statistics("VectorNeurons", (self.running_mean, self.running_var), seen, MOMENTUM)


class Layer(nn.Module):
    """Linear map, batch normalisation of norms and leaky ReLU; inputs are concatenated (axes of size 1 broadcast).

    inside (...): whose norms count in the statistics; None: all.
    """

    def __init__(self, in_width: int, width: int, shared_direction: bool = False) -> None:
        super().__init__()
        self.feature = nn.Parameter(uniform(width, in_width))
        self.direction = nn.Parameter(uniform(1 if shared_direction else width, in_width))
        self.norm = Norm(width)

    def forward(self, *inputs: Tensor, inside: Tensor | None = None) -> Tensor:
        weight = torch.cat([self.feature, self.direction]).to(inputs[0].dtype)
        weights = weight.split([x.shape[0] for x in inputs], 1)
        first, *rest = (linear(w, x) for w, x in zip(weights, inputs, strict=True))
        p, d = sum(rest, first).split([self.feature.shape[0], self.direction.shape[0]])
        return VectorActivation.of(p, d, *self.norm(p, inside))


class EdgeConvolution(Layer):
    """The layer on [x_j - x_i, x_i] for the k nearest j, then VN max pooling over them.

    The linear map runs once per node: W [x_j - x_i, x_i] = A x_j + C x_i. Pooling takes one neighbour per channel. No
    gradient reaches its direction (argmax), which is therefore a buffer, and only the pooled neighbours are
    differentiated. `ops.vector_edge_convolution` does all of it where it has a kernel, else the steps of `vector_steps`.

    one_pass: True; set it to False to take the steps always.
    detached_statistics: False; True: in training the gradient of the batch's statistics reaches the weights only, not the
    inputs, and the steps run. So the gradient of a cloud's values by its own points is as in eval mode, without those of
    other clouds, and second derivatives, for training by forces, cost half as much.
    """

    pool: Tensor

    def __init__(self, in_width: int, width: int, neighbors: int) -> None:
        super().__init__(2 * in_width, width)
        self.neighbors = neighbors
        self.one_pass = True
        self.detached_statistics = False
        self.register_buffer("pool", uniform(width, width))

    def takes_op(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether inputs like these run as one op, up to the sizes that its kernels take."""
        constants = self.detached_statistics and self.training  # the statistics, to the inputs
        return self.one_pass and not constants and OP.has_kernel_for(device, dtype)

    def extra_repr(self) -> str:
        dtype = promoted(self.feature.dtype, torch.float32)
        found = self.takes_op(self.feature.device, dtype)
        return f"neighbors={self.neighbors}, {'one pass' if found else 'by steps'}"

    def forward(self, x: Tensor, num_nodes: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (in, d, n, M) -> (w, d, n, M), of the first num_nodes (M,) of each cloud, and 0 elsewhere; None: of all."""
        norm = self.norm
        feature, direction, pool = (t.to(x.dtype) for t in (self.feature, self.direction, self.pool))
        fits = beyond_kernels(x.device.type, tuple(x.shape), feature.shape[0]) is None
        if fits and self.takes_op(x.device, x.dtype):
            learns = self.training and x.numel()
            running = None if learns else (norm.running_mean.to(x.dtype), norm.running_var.to(x.dtype))
            gain, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            weights = feature, direction, pool, gain, bias
            y, mean, variance, count = vector_edge_convolution(
                x, *weights, running, neighbors=self.neighbors, num_nodes=num_nodes
            )
            if learns:
                norm.move(mean, variance, count)
            return y
        inside = None if num_nodes is None else valid(num_nodes, x.shape[2])
        x = x if inside is None else torch.where(inside, x, 0)
        near, weight = nearest(x, self.neighbors, inside), node_maps(feature, direction)
        of_p = weight.unflatten(0, (2, 2, -1))[:, 0].flatten(0, 1)
        of_x = x.detach() if self.detached_statistics else x
        y = EdgeActivation.of(near, pool, *norm.of_pairs(near, of_p, of_x), weight, x)
        return y if inside is None else torch.where(inside, y, 0)
