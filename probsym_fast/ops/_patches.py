"""Padding of N slots and cutting into patches, and the checks shared by ops on graphs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from probsym_fast._autocast import autocasts, promoted
from probsym_fast._checks import batched, check_bool, check_count, check_float, looks_at_values, transformed
from probsym_fast._compilers import traced
from probsym_fast.ops._op import Op
from probsym_fast.ops.permutation import Permutation, SoftPermutation

PAD_MODES = ("zeros", "replicate", "reflect", "circular")


def patch_size(N: int, grid: int) -> int:
    """Slots per patch, with N slots in `grid` patches: max(1, ceil(N / grid))."""
    return max(1, -(-N // grid))


def padded_axis(N: int, grid: int, pad_mode: str, centered: bool, device: torch.device) -> tuple[Tensor, int, int]:
    """(slots, most_places, grid) for the schemas."""
    return slots_of_places(N, grid, pad_mode, centered, device), most_places(N, grid, pad_mode, centered), grid


def slots_of_places(N: int, grid: int, pad_mode: str, centered: bool, device: torch.device) -> Tensor:
    """(grid patch,) int64: the slot in each place of the padded axis, -1 for a zero.

    Padding adds grid patch - N places at the end, or half of them (rounded down) in front if `centered`. "zeros" pads
    zeros, "replicate" the nearest slot, "reflect" reflects at the first and last slot repeatedly, "circular" wraps
    modulo N.
    """
    # tensors made during tracing, in a transform or in a dispatch mode are not cached
    if torch.compiler.is_compiling() or transformed() or _get_current_dispatch_mode() is not None:
        return _slots(N, grid, pad_mode, centered, device)
    return _kept_slots(N, grid, pad_mode, centered, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached for calls outside of inference mode too
def _kept_slots(N: int, grid: int, pad_mode: str, centered: bool, device: torch.device) -> Tensor:
    return _slots(N, grid, pad_mode, centered, device)


def most_places(N: int, grid: int, pad_mode: str, centered: bool) -> int:
    """The largest number of places of one slot in `slots_of_places`, from the sizes only."""
    places = grid * patch_size(N, grid)
    front = (places - N) // 2 if centered else 0
    if pad_mode == "zeros":
        return 1
    if pad_mode == "circular" or N == 1:
        return -(-places // N)
    if pad_mode == "replicate":
        return 1 + max(front, places - N - front)
    # "reflect" walks from one end to the other in N - 1 steps, and back: a full walk meets an inner slot twice
    length = N - 1
    walks, rest = places // (2 * length), places % (2 * length)  # torch.compile has no divmod of dynamic sizes
    if N == 2:  # two ends, each met once per walk
        return walks + min(rest, 1)
    # the rest starts at -front: it meets an inner slot twice if it passes an end and goes on, once if it holds one
    turns = (rest - 2 - front) // length - -front // length if rest > 2 else 0
    return 2 * walks + (2 if turns > 0 else 1 if rest > 1 or (rest == 1 and front % length > 0) else 0)


def _slots(N: int, grid: int, pad_mode: str, centered: bool, device: torch.device) -> Tensor:
    places = grid * patch_size(N, grid)
    slot = torch.arange(places, device=device) - ((places - N) // 2 if centered else 0)
    if pad_mode == "zeros":
        return torch.where((slot >= 0) & (slot < N), slot, -1)
    if pad_mode == "replicate":
        return slot.clamp(0, N - 1)
    if pad_mode == "reflect":
        period = max(1, 2 * (N - 1))
        slot = slot.remainder(period)
        return torch.minimum(slot, period - slot) if N > 1 else torch.zeros_like(slot)
    return slot.remainder(N)


def pad_axis(x: Tensor, slots: Tensor, dim: int) -> Tensor:
    """x with its axis `dim` of N slots padded to the places; zero where slots is -1."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return torch.where(slots.view(shape) >= 0, x.index_select(dim, slots.clamp(min=0)), x.new_zeros(()))


def check_patches(op: str, weight: Tensor, bias: Tensor | None, N: int, grid: int, axes: int, bias_axis: int) -> int:
    """grid as a Python int.

    ValueError unless weight is (D, C, P[, P]) for `grid` patches of N slots and bias has the size of the weight's axis
    `bias_axis`. TypeError if grid (with one axis: `tokens`) is no int.
    """
    grid = check_count(op, "tokens" if axes == 1 else "grid", grid)
    if N < 1:
        raise ValueError(f"{op}: p must have at least one slot, got (B, S, N) with N = {N}")
    P = patch_size(N, grid)
    if weight.ndim != 2 + axes or tuple(weight.shape[2:]) != (P,) * axes or 0 in weight.shape:
        wanted = ", ".join(["D", "C"] + [str(P)] * axes)
        raise ValueError(
            f"{op}: weight must be ({wanted}) with patches of ceil(N / grid) = ceil({N} / {grid}), got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[bias_axis : bias_axis + 1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[bias_axis]},), got {tuple(bias.shape)}")
    return grid


def check_padding(op: str, pad_mode: str, centered: bool) -> None:
    check_bool(op, "centered", centered)
    if pad_mode not in PAD_MODES:
        raise ValueError(f"{op}: pad_mode must be one of {PAD_MODES}, got {pad_mode!r}")


def check_devices(op: str, device: torch.device, **tensors: Tensor) -> None:
    """RuntimeError unless every tensor is on `device`."""
    for name, x in tensors.items():
        if x.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, got {x.device}")


def check_permutation(op: str, p: Permutation) -> None:
    """Raises unless p is a Permutation (B, S, N) on one device."""
    check_parts(op, p)
    if len(p.shape) != 3:
        raise ValueError(f"{op}: p must be (B, S, N), got {tuple(p.shape)}")


def check_parts(op: str, p: Permutation) -> None:
    """TypeError unless p is a Permutation, RuntimeError unless its tensors are on one device."""
    if not isinstance(p, Permutation):
        raise TypeError(f"{op}: p must be a Permutation, got {type(p).__name__}")
    parts = {"rank": p.rank, "num_nodes": p.num_nodes}
    if isinstance(p, SoftPermutation):
        parts |= {"scores": p.scores, "log_r": p.log_r, "log_c": p.log_c}
    check_devices(op, p.order.device, **{f"p.{name}": x for name, x in parts.items() if x is not None})


def check_ptr(op: str, ptr: Tensor, p: Permutation) -> None:
    """Raises unless ptr (B + 1,) int64 holds offsets of graphs that fit the permutation (B, S, N), on its device."""
    check_permutation(op, p)
    if not isinstance(ptr, Tensor) or ptr.dtype != torch.int64:
        raise TypeError(
            f"{op}: ptr must be an int64 Tensor, got {ptr.dtype if isinstance(ptr, Tensor) else type(ptr).__name__}"
        )
    B, S, N = p.shape
    if tuple(ptr.shape) != (B + 1,):
        raise ValueError(
            f"{op}: ptr must be (B + 1,) = ({B + 1},) for a permutation of {B} graphs, got {tuple(ptr.shape)}"
        )
    if S < 1:
        raise ValueError(f"{op}: p must have at least one sample, got (B, S, N) = {(B, S, N)}")
    check_devices(op, p.order.device, ptr=ptr)
    if not looks_at_values(ptr, p.num_nodes):
        return
    nodes = ptr.diff()
    if int(ptr[0]) != 0 or (B and (int(nodes.min()) < 0 or int(nodes.max()) > N)):
        raise ValueError(f"{op}: ptr must rise from 0 by at most N = {N} a graph, got {ptr.tolist()[:16]}")
    counts = torch.full_like(nodes, N) if p.num_nodes is None else p.num_nodes
    given = isinstance(p, SoftPermutation) or p.num_nodes is not None  # otherwise any permutation of the N slots fits
    if given and not torch.equal(counts, nodes):
        bad = int((counts != nodes).nonzero()[0])
        raise ValueError(
            f"{op}: ptr must give graph {bad} the {int(counts[bad])} valid nodes of the permutation, got {int(nodes[bad])}"
        )


def count_nodes(op: str, ptr: Tensor, nodes: int | None) -> int:
    """ptr's last entry: `nodes` if given, else read, which waits for a GPU.

    ValueError if they differ. RuntimeError for nodes not given where ptr has no value: vmap runs over it, or it is traced.
    """
    if nodes is None:
        if batched(ptr) or traced():
            raise RuntimeError(f"{op}: nodes must be the number of nodes under vmap over ptr and in tracing, got None")
        return int(ptr[-1])
    nodes = check_count(op, "nodes", nodes, least=0)
    if looks_at_values(ptr) and int(ptr[-1]) != nodes:
        raise ValueError(f"{op}: ptr must end with the number of nodes {nodes}, got {int(ptr[-1])}")
    return nodes


def check_items(op: str, name: str, items: Tensor, ptr: Tensor) -> None:
    """ValueError unless each column of items (k, M) holds nodes of one graph; on a GPU only in debug mode."""
    if not looks_at_values(items, ptr) or not items.numel():
        return
    nodes = int(ptr[-1])
    bad = ((items < 0) | (items >= nodes)).nonzero()
    if len(bad):
        axis, column = bad[bad[:, 1].argmin()].tolist()
        raise ValueError(
            f"{op}: {name} must hold node numbers 0 to {nodes - 1}, got {int(items[axis, column])} in column {column}"
        )
    graph = torch.searchsorted(ptr.contiguous(), items.contiguous(), right=True) - 1
    bad = (graph[0] != graph[-1]).nonzero()
    if len(bad):
        column = int(bad[0])
        raise ValueError(
            f"{op}: {name} must join nodes of one graph, got column {column} from graph {int(graph[0, column])}"
            f" to graph {int(graph[-1, column])}"
        )


def rows_like(weight: Tensor) -> Tensor:
    """An empty tensor like the weight (D, C, P[, P]), stored with D innermost, as kernels return its gradient."""
    axes = range(weight.ndim)
    return weight.new_empty([*weight.shape[2:], weight.shape[1], weight.shape[0]]).permute(-1, -2, *axes[:-2])


def gradient_shapes(x: Tensor, t: Tensor | None, weight: Tensor, bias: int, needs: tuple) -> tuple:
    """Empty gradients of (x, the soft permutation, weight, bias); None for those not needed."""
    needs_x, needs_t, needs_weight, needs_bias = needs
    return (
        x.new_empty(x.shape) if needs_x else None,
        *(t.new_empty(t.shape) if t is not None and needs_t else None for _ in range(3)),
        rows_like(weight) if needs_weight else None,
        weight.new_empty(bias) if needs_bias else None,
    )


def _by_hand(p: SoftPermutation) -> bool:
    """Whether log_r or log_c is a leaf, so that its gradient may be asked for without that of the scores."""
    return not torch.compiler.is_compiling() and any(x.is_leaf and x.requires_grad for x in (p.log_r, p.log_c))


def soft_parts(p: Permutation, dtype: torch.dtype) -> tuple:
    """(rank, order, t, log_r, log_c, tau) for the schemas; t, log_r, log_c are None for a hard permutation."""
    if isinstance(p, SoftPermutation):
        dtype = promoted(dtype, torch.float32)
        t = p.scores
        if p.requires_grad and (
            not t.requires_grad or _by_hand(p)
        ):  # kernels return all three gradients if t needs one
            t = t + 0 * (p.log_r + p.log_c)
        return p.rank, p.order, t.to(dtype), p.log_r.to(dtype), p.log_c.to(dtype), p.tau
    return p.rank, p.order, None, None, None, 1.0


def common_dtype(op: str, kernels: Op, backend: str, **tensors: Tensor | None) -> torch.dtype:
    """The dtype that the op computes in: that of its floating inputs, which must agree.

    Dtypes below float32 become float32 if the kernels do not support them. Under autocast inputs may differ: the op
    computes in the widest of them.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    check_float(op, **given)
    (first, x), *rest = given.items()
    dtype = x.dtype
    for name, y in rest:
        if y.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on {x.device} as {first} is, got {y.device}")
        if y.dtype != x.dtype and not autocasts(x.device):
            raise TypeError(f"{op}: {name} must be {x.dtype} as {first} is, got {y.dtype}")
        dtype = promoted(dtype, y.dtype)
    return kernels.compute_dtype(backend, x.device, dtype)
