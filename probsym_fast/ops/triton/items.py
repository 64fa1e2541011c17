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
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from probsym_fast.ops._patches import patch_size
from probsym_fast.ops.triton import Refused
from probsym_fast.ops.triton._launch import bucket, cdiv, check_axes, check_counts, check_tensors, kernel, width_block
from probsym_fast.ops.triton._sort_by_key import group
from probsym_fast.ops.triton.entries import BLOCK, entries, places_of_slots
from probsym_fast.ops.triton.gather import gather, gather_one
from probsym_fast.ops.triton.graphs import MORE_ENDS, halvings
from probsym_fast.ops.triton.pairs import Lists, count_pairs, list_pairs
from probsym_fast.ops.triton.slot_values import read_slots

SPLIT, PROGRAMS = 16, 4096  # weight gradient: fewest entries of a weight row per program, on average; programs wanted


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
        if p_bias is not None:  # beside the pairs
            b_out = tl.load(p_bias + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_out += sum_of_rows(p_row, p_scaled, p_weight, b_first, b_last, o_d, D, BLOCK_E)
        tl.store(p_tokens + i_token * D + o_d, b_out.to(p_tokens.dtype.element_ty), mask=o_d < D)


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
        self.steps = halvings(self.B)
        self.E = self.S * self.M * self.copies if self.B else 0
        check_counts(entries_of_all_samples=self.E, tokens=self.tokens)

    @cached_property
    def places(self) -> Tensor:
        return places_of_slots(self.slots, self.N, self.Q)

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """token and offset of each entry, as `entries` gives them."""
        token, offset = self._numbers(self.E), self._numbers(self.E)
        entries(
            lambda settings: (cdiv(self.E, BLOCK),), self.items, self.ptr, self.rank, self.places, token, offset,
            self.E, *self._sizes, self.tokens, self.steps, AXES=self.axes, BLOCK=BLOCK,
        )  # fmt: skip
        return token, offset

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.M, self.S, self.N, self.B, self.grid, self.patch, self.Q

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.rank.device)

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

    def pairs(self, values: Tensor, scale: float, *, by_token: bool = False, by_row: bool = False) -> list[Lists]:
        """The pairs of an entry and a channel whose value is not zero, by token and by weight row, as asked for."""
        C, values, kinds = values.shape[1], values.contiguous(), by_token + by_row
        rows, tokens = self.offsets * C, self.tokens * by_token
        keys, pairs = tokens + rows * by_row, self.E * C
        check_counts(pairs_of_entries_and_channels=kinds * pairs, tokens_and_weight_rows=keys)
        token, offset, place = self._numbers(self.E), self._numbers(self.E), self._numbers(kinds, pairs)
        row, scaled = (
            self._numbers(kinds * pairs),
            torch.empty(kinds * pairs, dtype=torch.float32, device=values.device),
        )
        sorts, begin = torch.are_deterministic_algorithms_enabled(), None
        count = None if sorts else self._counts(keys)
        count_pairs(
            lambda settings: (cdiv(self.E, BLOCK),), self.items, self.ptr, self.rank, self.places, values, token, offset,
            count, place, self.E, *self._sizes, tokens, C, self.steps, AXES=self.axes, TOKENS=by_token, ROWS=by_row,
            BLOCK=BLOCK, BLOCK_C=min(8, bucket(C)),
        )  # fmt: skip
        if count is None:
            begin, order = group(place.view(-1), keys)
            place.view(-1)[order.long()] = torch.arange(kinds * pairs, dtype=torch.int32, device=values.device)
        else:
            begin = count.cumsum(0, dtype=torch.int32)
        list_pairs(
            lambda settings: (cdiv(pairs, BLOCK),), values, token, offset, None if sorts else begin, place, row, scaled,
            pairs, self.M, C, self.copies, tokens, float(scale), TOKENS=by_token, ROWS=by_row, BLOCK=BLOCK,
        )  # fmt: skip
        begins = [begin] * by_token + [begin[tokens:]] * by_row
        return [Lists(x, row, scaled) for x in begins]

    def _counts(self, keys: int) -> Tensor:
        """(keys + 1,) zeros; a launch of their own only where the places are known already."""
        if "places" in self.__dict__:
            return torch.zeros(keys + 1, dtype=torch.int32, device=self.rank.device)
        count = self._numbers(keys + 1)
        self.places = places_of_slots(self.slots, self.N, self.Q, count)
        return count

    def scatter(self, lists: Lists, W: Tensor, bias: Tensor | None) -> Tensor:
        """tokens (B, S, L, D), of W's dtype. lists: by token."""
        _, C, D = W.shape
        tokens = torch.empty(self.B, self.S, self.L, D, dtype=W.dtype, device=W.device)
        bias = None if bias is None else bias.contiguous()
        _scatter(
            lambda settings: (self.tokens,), *lists, W, bias, tokens, D,
            sizes=(self.tokens, D, C, self.S * self.M // max(1, self.tokens)), BLOCK_D=max(16, min(1024, bucket(D))),
        )  # fmt: skip
        return tokens

    def gather(self, tokens: Tensor, scale: float, W: Tensor, bias: Tensor | None) -> Tensor:
        """values (M, C), of the tokens' dtype."""
        _, C, D = W.shape
        values = torch.empty(self.M, C, dtype=tokens.dtype, device=tokens.device)
        tokens, bias, S = tokens.contiguous(), None if bias is None else bias.contiguous(), self.S if self.B else 0
        if self.Q == self.axes == 1:  # of nodes most tokens are read several times, of pairs few are read
            read_slots(self, tokens, scale, W, bias, values)
            return values
        sizes = self.M, self.S, C, D
        if C == self.Q == 1:
            places = self.slots.shape[0]
            gather_one(
                lambda settings: (self.M,), self.items, self.ptr, self.rank, self.slots, tokens, W, bias, values, self.M,
                S, self.N, self.B, self.grid, self.patch, places, D, halvings(self.B, MORE_ENDS), float(scale),
                sizes=sizes, BLOCK_P=64, BLOCK_D=width_block(D, 128),
            )  # fmt: skip
            return values
        block = min(16, bucket(C))
        gather(
            lambda settings: (self.M, cdiv(C, block)), *self.entries, tokens, W, bias, values, self.tokens, self.M, S, C, D,
            self.copies, float(scale), sizes=sizes, BLOCK_C=block, BLOCK_D=width_block(D, 512 if block <= 4 else 128),
        )  # fmt: skip
        return values

    def weight_gradient(self, lists: Lists, tokens: Tensor, W: Tensor) -> Tensor:
        """dW like W, summed in float32 for any dtype. lists: by weight row."""
        (offsets, C, D), block = W.shape, width_block(W.shape[-1], 256)
        rows, blocks = offsets * C, cdiv(W.shape[-1], block)
        splits = max(1, min(64, PROGRAMS // max(1, rows * blocks), self.S * self.M // max(1, rows * SPLIT)))
        dtype = W.dtype if splits == 1 else torch.float32
        out = torch.empty(splits, rows, D, dtype=dtype, device=W.device)
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


def weight_rows(weight: Tensor) -> Tensor:
    """(D, C, patch[, patch]) -> (patch^axes, C, D), contiguous; no copy if D is stored innermost."""
    last = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.permute(2, 1, 0)
    return last.contiguous().flatten(0, -3)


def weight_like(rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `weight_rows`, a view."""
    patch = weight.shape[2]
    return rows.unflatten(0, (patch, patch)).permute(3, 2, 0, 1) if weight.ndim == 4 else rows.permute(2, 1, 0)
