"""Items on patches, shared by `embed` and `readout`; csrc/cpu/items.h defines the terms.

An item is a node (axes = 1) or a pair of nodes (axes = 2) with C values. A sample puts it into a slot (pair). A slot has
up to Q places on the padded axis, and a place is in a cell at an offset. So an item has Q^axes entries (token, offset) per
sample, numbered e = (s M + item) Q^axes + copy; those beyond its places are empty.
  scatter               tokens[token] += scale value_c W[offset, c]
  gather                value_c        = scale sum_samples <tokens[token], W[offset, c]>
  weight_gradient       dW[offset, c] += scale value_c tokens[token]
tokens (B, S, L, D), W (patch^axes, C, D), values (M, C). Items that are not nodes of one graph of at most N nodes have no
entries, so invalid numbers never reach memory outside the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops._patches import patch_size
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import bucket, cdiv, check_axes, check_counts, check_tensors, kernel, width_block
from probsym_fast.ops.triton._sort_by_key import group

BLOCK = 128
SPLIT, PROGRAMS = 16, 4096  # weight gradient: fewest entries of a weight row per program, on average; programs wanted


@triton.jit
def graph_of(p_ptr, b_node, graphs, STEPS):
    """The graph of each node: how many graphs end at or before it."""
    b_low = b_node * 0
    b_high = b_low + graphs
    for _ in range(STEPS):
        b_middle = (b_low + b_high) // 2
        b_ends = tl.load(p_ptr + tl.minimum(b_middle + 1, graphs))
        b_before = (b_low < b_high) & (b_ends <= b_node)
        b_low = tl.where(b_before, b_middle + 1, b_low)
        b_high = tl.where(b_before, b_high, b_middle)
    return b_low


@kernel({"num_warps": 4})
def _places(p_slots, p_places, places, Q, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """places[slot, copy], ascending; -1 beyond the slot's places."""
    i_slot = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    b_slot = tl.load(p_slots + o_p, mask=o_p < places, other=-1)
    b_hit = (b_slot == i_slot).to(tl.int32)
    b_copy = tl.cumsum(b_hit, 0) - 1
    tl.store(p_places + i_slot * Q + b_copy, o_p, mask=(b_hit > 0) & (b_copy < Q))
    o_q = tl.arange(0, BLOCK_Q)
    tl.store(p_places + i_slot * Q + o_q, o_q * 0 - 1, mask=(o_q >= tl.sum(b_hit, 0)) & (o_q < Q))


@kernel({"num_warps": 4})
def _entries(
    p_items, p_ptr, p_rank, p_places, p_token, p_offset,
    E, M, S, N, graphs, grid, patch, Q, none, STEPS, AXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """token[e], counted over all samples, and offset[e]; an empty entry has token `none` and offset -1."""
    o_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # below 2^31: divided in 32 bits, then widened
    m_e = o_e < E
    b_copies = Q
    if AXES == 2:
        b_copies = Q * Q
    b_copy = o_e % b_copies
    b_item = ((o_e // b_copies) % M).to(tl.int64)
    b_sample = ((o_e // b_copies) // M).to(tl.int64)
    b_u = tl.load(p_items + b_item, mask=m_e, other=-1)
    m_e = m_e & (b_u >= 0) & (b_u < tl.load(p_ptr + graphs))
    b_u = tl.where(m_e, b_u, 0)
    b_graph = tl.minimum(graph_of(p_ptr, b_u, graphs, STEPS), graphs - 1)
    b_first = tl.load(p_ptr + b_graph, mask=m_e, other=0)
    b_last = tl.load(p_ptr + b_graph + 1, mask=m_e, other=0)
    b_sample = b_graph * S + b_sample
    m_e = m_e & (b_u >= b_first) & (b_u - b_first < N)
    b_row = tl.load(p_rank + b_sample * N + b_u - b_first, mask=m_e, other=-1)
    m_e = m_e & (b_row >= 0) & (b_row < N)
    if AXES == 2:
        b_v = tl.load(p_items + M + b_item, mask=m_e, other=-1)
        m_e = m_e & (b_v >= b_first) & (b_v < b_last) & (b_v - b_first < N)
        b_column = tl.load(p_rank + b_sample * N + b_v - b_first, mask=m_e, other=-1)
        m_e = m_e & (b_column >= 0) & (b_column < N)
        b_p = tl.load(p_places + b_row * Q + b_copy // Q, mask=m_e, other=-1)
        b_q = tl.load(p_places + b_column * Q + b_copy % Q, mask=m_e, other=-1)
        m_e = m_e & (b_p >= 0) & (b_q >= 0)
        b_token = b_sample * grid * grid + (b_p // patch) * grid + b_q // patch
        b_offset = (b_p % patch) * patch + b_q % patch
    else:
        b_p = tl.load(p_places + b_row * Q + b_copy, mask=m_e, other=-1)
        m_e = m_e & (b_p >= 0)
        b_token = b_sample * grid + b_p // patch
        b_offset = b_p % patch
    tl.store(p_token + o_e, tl.where(m_e, b_token, none), mask=o_e < E)
    tl.store(p_offset + o_e, tl.where(m_e, b_offset, -1), mask=o_e < E)


@kernel({"num_warps": 4})
def _find_pairs(p_values, p_token, p_offset, p_key, pairs, M, C, copies, BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """key[entry, channel]: the entry's token, or its weight row offset C + channel; -1 if it is empty or the value zero."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_entry, b_c = o_x // C, o_x % C
    b_item = (b_entry // copies % M).to(tl.int64)
    b_offset = tl.load(p_offset + b_entry, mask=o_x < pairs, other=-1)
    b_value = tl.load(p_values + b_item * C + b_c, mask=b_offset >= 0, other=0)
    b_key = b_offset * C + b_c
    if BY_TOKEN:
        b_key = tl.load(p_token + b_entry, mask=b_offset >= 0, other=0)
    tl.store(p_key + o_x, tl.where(b_value != 0, b_key, -1), mask=o_x < pairs)


@kernel({"num_warps": 4})
def _look_up_pairs(
    p_begin, p_pair, p_values, p_token, p_offset, p_row, p_scaled, keys, M, C, copies, scale,
    BY_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each pair in the lists: row, if BY_TOKEN the weight row offset C + channel, else the token; scaled, scale value.

    The sums read both at once, and then the row: without them three loads wait for each other.
    """
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < tl.load(p_begin + keys)
    b_pair = tl.load(p_pair + o_x, mask=m_x, other=0)
    b_entry, b_c = b_pair // C, b_pair % C
    b_item = (b_entry // copies % M).to(tl.int64)
    b_value = tl.load(p_values + b_item * C + b_c, mask=m_x, other=0).to(tl.float32)
    if BY_TOKEN:
        b_row = tl.load(p_offset + b_entry, mask=m_x, other=0) * C + b_c
    else:
        b_row = tl.load(p_token + b_entry, mask=m_x, other=0)
    tl.store(p_row + o_x, b_row, mask=m_x)
    tl.store(p_scaled + o_x, scale * b_value, mask=m_x)


@triton.jit
def sum_of_rows(p_row, p_scaled, p_from, b_first, b_last, o_d, D, BLOCK_E: tl.constexpr):
    """(BLOCK_D,): the sum of scaled from[row] over the pairs from b_first to b_last - 1, BLOCK_E at a time."""
    o_e = tl.arange(0, BLOCK_E)
    b_sum = tl.zeros((o_d.shape[0],), tl.float32)
    for k in range(b_first, b_last, BLOCK_E):
        m_e = k + o_e < b_last
        b_scaled = tl.load(p_scaled + k + o_e, mask=m_e, other=0)
        b_row = tl.load(p_row + k + o_e, mask=m_e, other=0).to(tl.int64)
        p_x = p_from + b_row[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x, mask=m_e[:, None] & (o_d < D)[None, :], other=0).to(tl.float32)
        b_sum += tl.sum(b_scaled[:, None] * b_x, 0)
    return b_sum


@kernel(
    {"PARTS": 1, "BLOCK_E": 4, "num_warps": 4},
    {"PARTS": 4, "BLOCK_E": 4, "num_warps": 1},
    {"PARTS": 1, "BLOCK_E": 8, "num_warps": 4},
    {"PARTS": 2, "BLOCK_E": 4, "num_warps": 2},
)
def _scatter(
    p_begin, p_row, p_scaled, p_weight, p_bias, p_tokens, D,
    PARTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: the bias + the sum of scaled W[row] over its pairs, in PARTS parts of BLOCK_D."""
    i_token = tl.program_id(0).to(tl.int64)
    b_first, b_last = tl.load(p_begin + i_token), tl.load(p_begin + i_token + 1)
    for d in range(0, D, BLOCK_D // PARTS):
        o_d = d + tl.arange(0, BLOCK_D // PARTS)
        b_out = tl.zeros((BLOCK_D // PARTS,), tl.float32)
        if p_bias is not None:
            b_out = tl.load(p_bias + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_out += sum_of_rows(p_row, p_scaled, p_weight, b_first, b_last, o_d, D, BLOCK_E)
        tl.store(p_tokens + i_token * D + o_d, b_out.to(p_tokens.dtype.element_ty), mask=o_d < D)


@kernel({"num_warps": 4}, {"num_warps": 2})
def _gather(
    p_token, p_offset, p_tokens, p_weight, p_bias, p_values, tokens, M, S, C, D, copies, scale,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One item, BLOCK_C channels: bias + scale times the sum over its entries of <tokens[token], W[offset, channel]>."""
    i_item = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_sum = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        for k in range(S * copies):
            b_entry = ((k // copies) * M + i_item) * copies + k % copies
            b_token = tl.load(p_token + b_entry).to(tl.int64)
            b_offset = tl.load(p_offset + b_entry).to(tl.int64)
            m_d = o_d < tl.where(b_token < tokens, D, 0)
            b_x = tl.load(p_tokens + b_token * D + o_d, mask=m_d, other=0).to(tl.float32)
            p_w = p_weight + (b_offset * C + o_c)[:, None] * D + o_d[None, :]
            b_sum += b_x[None, :] * tl.load(p_w, mask=m_c[:, None] & m_d[None, :], other=0).to(tl.float32)
    b_value = scale * tl.sum(b_sum, 1)
    if p_bias is not None:
        b_value += tl.load(p_bias + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_values + i_item * C + o_c, b_value.to(p_values.dtype.element_ty), mask=m_c)


@kernel({"BLOCK_E": 16, "num_warps": 8}, {"BLOCK_E": 8, "num_warps": 4}, {"BLOCK_E": 4, "num_warps": 4})
def _gather_one(
    p_token, p_offset, p_tokens, p_weight, p_bias, p_values, tokens, M, S, D, copies, scale,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One item of one channel, as `_gather`. Waits for BLOCK_E entries at once, and then for their rows."""
    i_item = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    b_sum = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for e in range(0, S * copies, BLOCK_E):
        o_k = e + o_e
        m_k = o_k < S * copies
        o_entry = ((o_k // copies) * M + i_item) * copies + o_k % copies
        b_token = tl.load(p_token + o_entry, mask=m_k, other=tokens).to(tl.int64)
        b_offset = tl.load(p_offset + o_entry, mask=m_k, other=0).to(tl.int64)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            m_d = (b_token < tokens)[:, None] & (o_d < D)[None, :]
            b_x = tl.load(p_tokens + b_token[:, None] * D + o_d[None, :], mask=m_d, other=0).to(tl.float32)
            b_w = tl.load(p_weight + b_offset[:, None] * D + o_d[None, :], mask=m_d, other=0).to(tl.float32)
            b_sum += b_x * b_w
    b_value = scale * tl.sum(b_sum)
    if p_bias is not None:
        b_value += tl.load(p_bias).to(tl.float32)
    tl.store(p_values + i_item, b_value.to(p_values.dtype.element_ty))


@kernel({"BLOCK_E": 4, "num_warps": 1}, {"BLOCK_E": 8, "num_warps": 1}, {"BLOCK_E": 8, "num_warps": 2})
def _weight_gradient(
    p_begin, p_row, p_scaled, p_tokens, p_out, rows, D, splits, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One weight row (offset, channel) and one part of its pairs: out[part, row] = the sum of scaled tokens[row]."""
    i_row, i_split = tl.program_id(0), tl.program_id(2)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_first = tl.load(p_begin + i_row)
    b_last = tl.load(p_begin + i_row + 1)
    b_part = (b_last - b_first + splits - 1) // splits
    b_first += i_split * b_part
    b_last = tl.minimum(b_last, b_first + b_part)
    b_out = sum_of_rows(p_row, p_scaled, p_tokens, b_first, b_last, o_d, D, BLOCK_E)
    p_line = p_out + (i_split.to(tl.int64) * rows + i_row) * D + o_d
    tl.store(p_line, b_out.to(p_out.dtype.element_ty), mask=o_d < D)


@dataclass
class Items:
    """The inputs of the four sums: on one device, contiguous."""

    items: Tensor  # (axes, M), global node numbers
    ptr: Tensor  # (B + 1,)
    rank: Tensor  # (B, S, N)
    slots: Tensor  # (grid patch,)
    Q: int  # most places of a slot
    grid: int

    def __post_init__(self):
        names = ("items", "ptr", "rank", "slots")
        self.items, self.ptr, self.rank, self.slots = (getattr(self, x).contiguous() for x in names)
        self.axes, self.M = check_axes("items", self.items, 2)
        self.B, self.S, self.N = check_axes("rank", self.rank, 3)
        if self.axes not in (1, 2):
            raise Refused(ValueError, f"items must be (1, M) or (2, M), got {tuple(self.items.shape)}")
        self.patch = patch_of(self.slots, self.N, self.grid)
        check_tensors(
            self.rank.device,
            items=(self.items, (self.axes, self.M)),
            ptr=(self.ptr, (self.B + 1,)),
            slots=(self.slots, self.slots.shape),
        )
        if not 1 <= self.Q <= max(1, self.slots.shape[0]):
            raise Refused(ValueError, f"most_places must be 1 to the {self.slots.shape[0]} places, got {self.Q}")
        self.copies = self.Q**self.axes
        self.L = self.grid**self.axes
        self.tokens, self.offsets = self.B * self.S * self.L, self.patch**self.axes
        self.steps = self.B.bit_length()
        E = self.S * self.M * self.copies if self.B else 0
        check_counts(entries_of_all_samples=E, tokens=self.tokens)
        self.places = places_of_slots(self.slots, self.N, self.Q)
        self.token, self.offset = (torch.empty(E, dtype=torch.int32, device=self.items.device) for _ in range(2))
        _entries(
            lambda settings: (cdiv(E, BLOCK),), self.items, self.ptr, self.rank, self.places, self.token,
            self.offset, E, self.M, self.S, self.N, self.B, self.grid, self.patch, self.Q, self.tokens, self.steps,
            AXES=self.axes, BLOCK=BLOCK,
        )  # fmt: skip

    def check(
        self, weight: Tensor, tokens: Tensor | None, values: Tensor | None, bias: Tensor | None, *soft: Tensor | None
    ) -> None:
        """Refuses unfit arguments: weight (D, C, patch[, patch]), tokens, values, bias; order, t, log_r, log_c."""
        D, C, *_ = check_axes("weight", weight, 2 + self.axes)
        samples = self.B, self.S, self.N
        check_tensors(
            self.rank.device,
            weight=(weight, (D, C, *(self.patch,) * self.axes)),
            tokens=(tokens, (self.B, self.S, self.L, D)),
            values=(values, (self.M, C)),
            bias=(bias, (C,) if values is None else (D,)),
            **{name: (x, samples) for name, x in zip(("order", "t", "log_r", "log_c"), soft, strict=True)},
        )

    def pairs(self, values: Tensor, scale: float, by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
        """begin, row, scaled: the pairs of an entry and a channel whose value is not zero, by token or by weight row.

        begin as `group` gives it, the other two as `_look_up_pairs` does. Lists of pairs, since of one-hot values all but one
        are zero: nothing is read for the others.
        """
        C, values = values.shape[1], values.contiguous()
        pairs, keys = self.token.shape[0] * C, self.tokens if by_token else self.offsets * C
        check_counts(pairs_of_entries_and_channels=pairs, weight_rows=self.offsets * C)
        key, row = (torch.empty(pairs, dtype=torch.int32, device=values.device) for _ in range(2))
        scaled = torch.empty(pairs, dtype=torch.float32, device=values.device)

        def grid(settings):
            return (cdiv(pairs, BLOCK),)

        _find_pairs(
            grid, values, self.token, self.offset, key, pairs, self.M, C, self.copies, BY_TOKEN=by_token, BLOCK=BLOCK
        )
        begin, pair = group(key, keys)
        _look_up_pairs(
            grid, begin, pair, values, self.token, self.offset, row, scaled, keys, self.M, C, self.copies,
            float(scale), BY_TOKEN=by_token, BLOCK=BLOCK,
        )  # fmt: skip
        return begin, row, scaled

    def scatter(self, values: Tensor, scale: float, W: Tensor, bias: Tensor | None) -> Tensor:
        """tokens (B, S, L, D), of W's dtype."""
        _, C, D = W.shape
        tokens = torch.empty(self.B, self.S, self.L, D, dtype=W.dtype, device=W.device)
        lists, bias = self.pairs(values, scale, by_token=True), None if bias is None else bias.contiguous()
        _scatter(
            lambda settings: (self.tokens,), *lists, W, bias, tokens, D,
            sizes=(self.tokens, D, C, self.S * self.M // max(1, self.tokens)), BLOCK_D=max(16, min(1024, bucket(D))),
        )  # fmt: skip
        return tokens

    def gather(self, tokens: Tensor, scale: float, W: Tensor, bias: Tensor | None) -> Tensor:
        """values (M, C), of the tokens' dtype."""
        _, C, D = W.shape
        values = torch.empty(self.M, C, dtype=tokens.dtype, device=tokens.device)
        bias, S = None if bias is None else bias.contiguous(), self.S if self.B else 0
        read, sizes = (self.token, self.offset, tokens.contiguous(), W, bias), (self.M, self.S, C, D)
        counts = self.tokens, self.M, S
        if C == 1:
            _gather_one(
                lambda settings: (self.M,), *read, values, *counts, D, self.copies, float(scale),
                sizes=sizes, BLOCK_D=width_block(D, 512),
            )  # fmt: skip
            return values
        block = min(16, bucket(C))
        _gather(
            lambda settings: (self.M, cdiv(C, block)), *read, values, *counts, C, D, self.copies, float(scale),
            sizes=sizes, BLOCK_C=block, BLOCK_D=width_block(D, 512 if block <= 4 else 128),
        )  # fmt: skip
        return values

    def weight_gradient(self, values: Tensor, scale: float, tokens: Tensor, W: Tensor) -> Tensor:
        """dW like W, summed in float32 for any dtype."""
        (offsets, C, D), block = W.shape, width_block(W.shape[-1], 256)
        rows, blocks = offsets * C, cdiv(W.shape[-1], block)
        splits = max(1, min(64, PROGRAMS // max(1, rows * blocks), self.S * self.M // max(1, rows * SPLIT)))
        dtype = W.dtype if splits == 1 else torch.float32
        out = torch.empty(splits, rows, D, dtype=dtype, device=W.device)
        lists = self.pairs(values, scale, by_token=False)
        _weight_gradient(
            lambda settings: (rows, blocks, splits), *lists, tokens.contiguous(), out, rows, D, splits,
            sizes=(rows, D, self.S * self.M // offsets), BLOCK_D=block,
        )  # fmt: skip
        return (out[0] if splits == 1 else out.sum(0).to(W.dtype)).view(W.shape)


def patch_of(slots: Tensor, N: int, grid: int) -> int:
    """Slots per patch, with N slots padded to the places of `slots` (grid patch,); refused if the sizes disagree."""
    if grid < 1 or N < 1:
        raise Refused(ValueError, f"grid must be at least 1 for at least 1 slot, got {grid} for {N}")
    patch = patch_size(N, grid)
    check_tensors(slots.device, slots=(slots, (grid * patch,)))
    return patch


def places_of_slots(slots: Tensor, N: int, most: int) -> Tensor:
    """(N, most) int32: the places of each slot, ascending; -1 beyond."""
    places, count = torch.empty(N, most, dtype=torch.int32, device=slots.device), slots.shape[0]
    _places(lambda settings: (N,), slots, places, count, most, BLOCK_P=bucket(count), BLOCK_Q=bucket(most))
    return places


def weight_rows(weight: Tensor) -> Tensor:
    """(D, C, patch[, patch]) -> (patch^axes, C, D), contiguous; no copy if D is stored innermost."""
    last = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.permute(2, 1, 0)
    return last.contiguous().flatten(0, -3)


def weight_like(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `weight_rows`, a view."""
    patch = weight.shape[2]
    return rows.unflatten(0, (patch, patch)).permute(3, 2, 0, 1) if weight.ndim == 4 else rows.permute(2, 1, 0)
