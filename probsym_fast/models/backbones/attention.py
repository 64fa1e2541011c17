"""Every derivative of networks with torch's fused attention, which has the first one only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from probsym_fast._checks import transformed

FUSED = "ScaledDotProduct"  # how torch's nodes of fused attention are called
PREPARED = "probsym_fast: prepared for"  # in a node's metadata: the last backward pass that it has a hook for
Gradients = Sequence[Tensor | None]


def every_derivative(run: Callable[..., Any], *inputs: Tensor) -> Any:
    """run(*inputs), a pytree, of blocks that may call `F.scaled_dot_product_attention` between the inputs and the outputs.

    Under torch.func and in forward mode attention is its plain formula, as inside `sdpa_kernel(SDPBackend.MATH)`. Else it
    is torch's fused one, and so is its gradient, until a backward pass has `create_graph=True`: then attention's part of the
    gradient is that of the formula, the same up to rounding, which has further derivatives. Fused attention with dropout
    (on a GPU) cannot be repeated: there a second backward pass raises RuntimeError. Programs of torch.compile keep torch's.
    """
    if transformed():
        with sdpa_kernel(SDPBackend.MATH):
            return run(*inputs)
    outputs = run(*inputs)
    if not torch.compiler.is_compiling():
        first = {x.grad_fn for x in inputs}
        tensors = [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]
        # a view loses its own node if it is changed in place; a node that held itself would stay alive
        for last in {(y if y._base is None else y._base).grad_fn for y in tensors} - first:
            if last is not None:
                last.register_prehook(partial(_prepare, first))
    return outputs


def _prepare(first: set, _: Gradients) -> None:
    """Before a backward pass with create_graph=True: hooks for it, on the nodes from this one to the first ones.

    Regions may overlap, as a backbone's and its model's do: a node gets one hook a pass.
    """
    if torch.is_grad_enabled():
        this = torch._C._current_graph_task_id()
        nodes = _fused(torch._C._current_autograd_node(), first)  # the hook would keep it alive if it held it
        nodes = [node for node in nodes if node.metadata.get(PREPARED) != this]
        for node, saved in zip(nodes, _in_own_pass(lambda: [*map(_saved, nodes)]), strict=True):
            node.metadata[PREPARED] = this
            _Replaced(node, saved)


def _fused(last: Any, first: set) -> list:
    """The nodes of fused attention."""
    found, seen, todo = [], {*first, None}, [last]
    while todo:
        if (node := todo.pop()) not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
            if node.name().startswith(FUSED):
                found.append(node)
    return found


def _saved(node: Any) -> dict[str, Any]:
    bias = getattr(node, "_saved_attn_mask", None)
    return {
        "inputs": (node._saved_query, node._saved_key, node._saved_value),
        "bias": getattr(node, "_saved_attn_bias", None) if bias is None else bias,
        "dropout": node._saved_dropout_p,
        "causal": node._saved_is_causal,
        "scale": node._saved_scale,
    }


def _in_own_pass(read: Callable[[], list]) -> list:
    """read(), as in another backward pass: in one pass torch's checkpoints give each tensor only once."""
    found: list = []
    x = torch.zeros((), requires_grad=True)
    y = x.clone()
    y.register_hook(lambda _: found.extend(read()))
    torch.autograd.grad(y, x)
    return found


class _Replaced:
    """A hook of a fused node, for one pass, that replaces its gradients by those of the formula."""

    def __init__(self, node: Any, saved: dict[str, Any]):
        self.saved, self.handle = saved, node.register_hook(self)

    def __call__(self, found: Gradients, given: Gradients) -> Gradients | None:
        self.handle.remove()
        if not torch.is_grad_enabled():  # a later pass: the one that it was made for did not come here
            return None
        if self.saved["dropout"]:
            return tuple(None if x is None else _Once.apply(x) for x in found)
        return gradients(found, given, **self.saved)


def gradients(
    found: Gradients,
    given: Gradients,
    inputs: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    causal: bool,
    scale: float | None,
    **_: Any,
) -> Gradients:
    """Those of softmax(q k^T scale + bias) v in place of the found ones, of the given one by the output.

    q (M, heads, L, d), k and v (M, heads, K, d), bias broadcast to (M, heads, L, K). scale: 1 / sqrt(d) if None. Where found
    is None, none is wanted.
    """
    tensors = [x.view_as(x) for x in (*inputs, *([] if bias is None else [bias]))]  # one tensor may be given twice
    q, k, v, *mask = tensors
    math = torch.ops.aten._scaled_dot_product_attention_math
    y = math(q, k, v, mask[0] if mask else None, 0.0, causal, None, scale=scale)[0]
    wanted = [x for x, old in zip(tensors, found, strict=False) if old is not None]
    new = iter(torch.autograd.grad(y, wanted, given[0], create_graph=True))
    return tuple(None if old is None else next(new) for old in found)


class _Once(torch.autograd.Function):
    """The same gradient, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError(
            "attention: dropout must be 0 for second derivatives of torch's fused attention; with dropout, run the model"
            " inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        )
