"""Models as programs of tensors, for torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probsym_fast._batch import axes_of, named_size, sizes_of
from probsym_fast._checks import check_bool, check_count, check_type
from probsym_fast.batches import check_batch
from probsym_fast.models.symmetrized import Symmetrized
from probsym_fast.ops import using_backend
from probsym_fast.ops.noise import OP as NOISE
from probsym_fast.ops.reference.noise import without_overflow

if TYPE_CHECKING:
    from torch.export import ExportedProgram

BACKENDS = ("auto", "reference", "onnx")


def export(
    model: Symmetrized,
    example: Any,
    samples: int,
    *,
    dynamic: Sequence[str] | Mapping[str, int | None] | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> ExportedProgram:
    """The model as a `torch.export` program: tensors in, the prediction out, in its own structure (a dict, a tuple, ...).

    The inputs are the fields of the example that are not None, in order, then a seed, a () int64 tensor.

    Args:
        model: in eval mode.
        example: a batch: a dataclass of tensors. Its class names the sizes that may change in `axes` (`Batch.axes`).
        samples: group elements per graph or cloud, fixed in the program.
        dynamic: sizes that may differ from the example's: "batch", "nodes", "edges" and "pairs" for `Graphs`, "batch" and
            "points" for `PointClouds`, "batch", "height" and "width" for `Images`, the names in its axes for a batch of your
            own. A mapping gives the largest, such as {"batch": None, "points": 64} for a `Transformer`, whose op takes up to
            64 tokens. None: all that the example has, without points, height and width. They are at least 2 in the example;
            the program takes 1, too, and 0 if the network does.
        backend: "auto": the program calls this package's ops, which `import probsym_fast.ops` registers.
            "reference": it has only torch's own operations, for processes without this package and for C++. Its ops take
            the memory of dense matrices. "onnx": the same, without operations that torch.onnx.export lacks.
        strict: of torch.export, to trace with TorchDynamo.

    Raises: TypeError for arguments of another type. ValueError for a model in training mode, with chunk="auto" or a
        samples_mesh, for unknown names of sizes, for sizes below 2, and where the model fixes a dynamic size.
    """
    strict = check_bool("export", "strict", strict)
    check_type("export", "model", model, Symmetrized, "a Symmetrized")
    check_batch("export", example, name="example")
    example.check()
    samples = check_count("export", "samples", samples)
    _check_model(model)
    if backend not in BACKENDS:
        raise ValueError(f"export: backend must be one of {BACKENDS}, got {backend!r}")
    if not is_dataclass(example) or isinstance(example, type):
        raise TypeError(f"export: example must be a dataclass of tensors, got {type(example).__name__}")
    there = {field.name: getattr(example, field.name) for field in fields(example)}
    there = {name: x for name, x in there.items() if x is not None}
    if other := [name for name, x in there.items() if not isinstance(x, Tensor)]:
        kind = type(there[other[0]]).__name__
        raise TypeError(f"export: {other[0]} of the example must be a Tensor or None, got {kind}")
    shapes = _shapes(example, there, dynamic)
    program = _program(tuple(there))(model, type(example), samples)
    inputs = *there.values(), torch.zeros((), dtype=torch.int64, device=next(iter(there.values())).device)
    from torch._dynamo.exc import UserError  # only here: it imports torch's compiler
    from torch.fx.experimental import _config

    config: Any = _config  # its functions are added when it is imported
    # A program for many inputs takes one, too: torch sees to it for sizes of fields. Where the number of inputs is one less
    # than a size, as of offsets (B + 1,), only with backed_size_oblivious, which fixes it in some networks of one sample.
    derived = any(named_size(size)[1] for name in there for size in axes_of(example).get(name, {}).values())
    ops = using_backend("auto" if backend == "auto" else "reference")
    with torch.no_grad(), ops, config.patch(backed_size_oblivious=derived):
        try:
            found = torch.export.export(program, inputs, dynamic_shapes=(*shapes, None), strict=strict)
        except UserError as error:
            if "Constraints violated" not in str(error):
                raise
            wrong = str(error).partition("(")[2].partition(")")[0].removesuffix(" + 1")
            raise ValueError(
                f"export: dynamic must leave out sizes that the model fixes, got {wrong!r}; the error above says where"
            ) from error
    if backend != "auto":
        found = found.run_decompositions({NOISE.reference: without_overflow})
    if backend == "onnx":
        aten = torch.ops.aten
        found = found.run_decompositions(
            {
                aten.repeat_interleave.self_Tensor: _repeated,
                aten.searchsorted.Tensor: _searched,
                aten.sort.stable: _sorted,
                aten.argsort.stable: lambda x, **named: _sorted(x, **named)[1],
                aten.cdist.default: _distances,
                aten.kthvalue.default: _smallest,
            }
        )
    return found


def _check_model(model: Symmetrized) -> None:
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"export: model must be in eval mode, got training mode of {training[0]}; call model.eval()")
    if model.samples_mesh is not None:
        raise ValueError("export: samples_mesh must be None, since a program runs in one process, got a mesh")
    if model.chunk == "auto":
        raise ValueError("export: chunk must be a number or None in a program, got 'auto'; set model.chunk")


def _shapes(
    example: Any, there: dict[str, Tensor], dynamic: Sequence[str] | Mapping[str, int | None] | None
) -> list[dict[int, Any] | None]:
    """dynamic_shapes of torch.export, for each field."""
    if isinstance(dynamic, str):
        raise TypeError(f"export: dynamic must be a sequence of names, got the str {dynamic!r}")
    axes, sizes = axes_of(example), sizes_of(example)
    fixed = getattr(example, "fixed", ())
    wanted = tuple(size for size in sizes if size not in fixed) if dynamic is None else tuple(dynamic)
    if unknown := [size for size in wanted if size not in sizes]:
        raise ValueError(
            f"export: dynamic must name some of {tuple(sizes)} for this {type(example).__name__}, got {unknown[0]!r}"
        )
    if small := [size for size in wanted if sizes[size] < 2]:
        raise ValueError(
            f"export: example must have a size of at least 2 where it is dynamic, got {small[0]} = {sizes[small[0]]}"
        )
    most = dict(dynamic) if isinstance(dynamic, Mapping) else {}
    for size, limit in most.items():
        if limit is not None and check_count("export", f"dynamic[{size!r}]", limit) < sizes[size]:
            raise ValueError(f"export: dynamic[{size!r}] must be at least the example's {sizes[size]}, got {limit}")
    dims: dict[str, Any] = {size: torch.export.Dim(size, max=most.get(size)) for size in wanted}
    shapes: list[dict[int, Any] | None] = []
    for name in there:
        named = {axis: named_size(size) for axis, size in axes.get(name, {}).items()}
        shapes.append(
            {axis: dims[size] + more if more else dims[size] for axis, (size, more) in named.items() if size in dims}
        )
    return shapes


# --- in operations that ONNX has ---


def _repeated(x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
    if output_size is None:
        return NotImplemented
    place = torch.arange(output_size, device=x.device)
    return x.index_select(dim or 0, _searched(repeats.cumsum(0), place, right=True))


def _searched(
    ends: Tensor,
    x: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Tensor:
    if out_int32 or side is not None or sorter is not None:
        return NotImplemented
    return ((x[..., None] >= ends) if right else (x[..., None] > ends)).sum(-1)


def _sorted(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """ONNX's TopK puts the first of equals first."""
    values, order = torch.topk(x, x.shape[dim], dim, largest=descending)
    return values, order


def _distances(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    if p != 2:
        return NotImplemented
    return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1).sqrt()


def _smallest(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, ...]:
    """The k-th one, counted from 1."""
    found = (y.narrow(dim, k - 1, 1) for y in torch.topk(x, k, dim, largest=False))
    return tuple(y if keepdim else y.squeeze(dim) for y in found)


class _Program(nn.Module):
    """Tensors in, the prediction out."""

    names: tuple[str, ...]

    def __init__(self, model: Symmetrized, kind: type, samples: int):
        super().__init__()
        self.model, self.kind, self.samples = model, kind, samples

    def predict(self, *tensors: Tensor) -> Any:
        batch = self.kind(**dict(zip(self.names, tensors, strict=False)))
        return self.model(batch, samples=self.samples, seed=tensors[-1])[0]


def _program(names: tuple[str, ...]) -> type[_Program]:
    """The class whose forward takes these fields and the seed: torch.export reads the names of inputs from its signature."""

    def forward(self: _Program, *tensors: Tensor) -> Any:
        return self.predict(*tensors)

    parameters = [inspect.Parameter(x, inspect.Parameter.POSITIONAL_OR_KEYWORD) for x in ("self", *names, "seed")]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function takes it
    return type("Program", (_Program,), {"names": names, "forward": forward})
