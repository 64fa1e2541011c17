"""The gradient of anything that reads a soft permutation as a matrix: G = dL/dP, reduced against P tile by tile.

P[i, j] = exp(log_r_i + log_c_j - |t_i - t_j| / tau), rows in sorted order. With Q = G o P,
    d log_r_i = sum_j Q_ij,   d log_c_j = sum_i Q_ij,   d t_i = (sum_{j<i} - sum_{j>i}) (Q_ij + Q_ji) / tau
A program holds a block of rows of one sample and loops over its columns. It keeps the sums of its rows. It stores column
sums, one part per block of rows, which are then added in that order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops.triton._launch import cdiv, width_block


@triton.jit
def reduce_tile(b_g, o_i, o_j, b_nodes, N, p_soft, p_columns, plane, by_tau):
    """Stores the column sums of a tile G (rows o_i, columns o_j) and returns its row sums: to t, to log_r."""
    m_i, m_j = o_i < b_nodes, o_j < b_nodes
    b_t_i = tl.load(p_soft + o_i, mask=m_i, other=0)
    b_r_i = tl.load(p_soft + plane + o_i, mask=m_i, other=0)
    b_t_j = tl.load(p_soft + o_j, mask=m_j, other=0)
    b_c_j = tl.load(p_soft + plane + plane + o_j, mask=m_j, other=0)
    b_sign = (o_j[None, :] < o_i[:, None]).to(tl.float32) - (o_j[None, :] > o_i[:, None]).to(tl.float32)
    b_log_p = b_r_i[:, None] + b_c_j[None, :] - b_sign * (b_t_j[None, :] - b_t_i[:, None]) * by_tau
    b_q = tl.where(m_i[:, None] & m_j[None, :], b_g * tl.exp(b_log_p), 0.0)
    b_pull = b_sign * b_q * by_tau
    tl.store(p_columns + o_j, -tl.sum(b_pull, 0), mask=o_j < N)
    tl.store(p_columns + plane + o_j, tl.sum(b_q, 0), mask=o_j < N)
    return tl.sum(b_pull, 1), tl.sum(b_q, 1)


class SoftTiles:
    """What the programs read and write for all samples, in float32.

    soft: (3, B S, N) t, log_r, log_c. rows: (parts, 2, B S, N) gradients of t and log_r. columns: (blocks, 2, B S, N) of t
    and log_c. A program holds `block` rows of all columns; if `square`, as many columns, and rows have a part for each block.
    """

    def __init__(self, t: Tensor, log_r: Tensor, log_c: Tensor, most: int = 64, square: bool = False):
        self.shape, self.dtype, N = t.shape, t.dtype, t.shape[-1]
        self.soft = torch.stack([x.reshape(-1, N).float() for x in (t, log_r, log_c)])
        self.plane = self.soft[0].numel()
        self.block = width_block(N, most)
        self.blocks = cdiv(N, self.block)
        samples = self.soft.shape[1]
        self.rows = torch.empty(self.blocks if square else 1, 2, samples, N, dtype=torch.float32, device=t.device)
        self.columns = torch.empty(self.blocks, 2, samples, N, dtype=torch.float32, device=t.device)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_t, d_log_r, d_log_c (B, S, N), each with memory of its own, as a compiled program expects."""
        (d_t, d_log_r), (of_columns, d_log_c) = ([x[:, k].sum(0) for k in range(2)] for x in (self.rows, self.columns))
        found = d_t.add_(of_columns), d_log_r, d_log_c
        d_t, d_log_r, d_log_c = (x.view(self.shape).to(self.dtype) for x in found)
        return d_t, d_log_r, d_log_c
