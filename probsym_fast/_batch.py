"""The base class of batches: what models, groups and distributions read of one, and torch's tools."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node

T = TypeVar("T", bound="Batch")


class Batch:
    """A batch of B inputs. Subclasses are dataclasses with eq=False; fields are tensors, or None if they have a default.

        @dataclass(eq=False)
        class Fields(psf.Batch):
            vectors: torch.Tensor  # (B, n, 3), one at each of n nodes
            charges: torch.Tensor | None = None  # (B, n)

            layouts = {"vectors": "nv", "charges": "n"}

    Such a batch is a pytree of the fields that are not None, and torch.load takes it. It has `to`, `pin_memory`, `replace`,
    and everything below; a subclass overrides what is otherwise for it.

    axes: for each field the names of its sizes by axis; default: axis 0 of every field is "batch". A name with " + 1" is
        one longer than that size, as offsets are. `check` compares sizes of one name, and `export` makes them dynamic, those
        in `fixed` only where they are named.
    layouts: for each field that the group moves its layout, as in `Group.act`, without the batch axis; for `moved`.
    size: B, the size named "batch". dtype: that of the first floating-point field (of complex numbers that of their parts),
        else the default dtype. device: that of the first field.
    num_nodes: (B,) int64 valid nodes, for groups that permute nodes; None: all. center: (B, d) centroids, for groups with
        translations, or None. key: (B,) int64 keys of the inputs for fixed noise, if there is such a field. Fields of these
        names take the place of None.

    A batch need not be a subclass. Of any object models read size, dtype, device and check(), groups num_nodes and center,
    fixed noise names(rows), `equivariance_error` moved and carried, and `export` axes, if it is a dataclass.
    """

    axes: ClassVar[dict[str, dict[int, str]] | None] = None
    fixed: ClassVar[tuple[str, ...]] = ()
    layouts: ClassVar[dict[str, str] | None] = None

    if TYPE_CHECKING:

        @property
        def num_nodes(self) -> Tensor | None: ...

        @property
        def center(self) -> Tensor | None: ...

    else:  # plain attributes, since a dataclass takes an inherited property for the default of a field of its name
        num_nodes = center = None

    # Not frozen: Lightning's precision plugins refuse frozen dataclasses.
    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        register_pytree_node(
            cls,
            _flatten,
            partial(_unflatten, cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )
        torch.serialization.add_safe_globals([cls])  # torch.load takes it, in exported programs too

    def check(self) -> None:
        """Raises TypeError where a field is no Tensor, RuntimeError for devices, ValueError for sizes (`axes`).

        Also TypeError for a class that is no dataclass, and ValueError where `axes` or `layouts` name no field.
        """
        owner, named, first = type(self).__name__, axes_of(self), ""
        if not torch.compiler.is_compiling():
            _check_annotations(type(self))
        _check_names(self, "layouts", self.layouts)
        sizes: dict[str, int] = {}
        for field in _fields(self):
            name, x = field.name, getattr(self, field.name)
            if x is None and field.default is not MISSING:
                continue
            _check_tensor(owner, field, x)
            first = first or name
            if x.device != self.device:
                raise RuntimeError(f"{owner}: {name} must be on {self.device} as {first} is, got {x.device}")
            for axis, size in named.get(name, {}).items():
                if x.ndim <= axis:
                    raise ValueError(f"{owner}: {name} must have {axis + 1} axes or more, got {tuple(x.shape)}")
                known, more = named_size(size)
                if x.shape[axis] != sizes.setdefault(known, x.shape[axis] - more) + more:
                    wanted = f"{size} = {sizes[known] + more}"
                    raise ValueError(f"{owner}: axis {axis} of {name} must be {wanted}, got {tuple(x.shape)}")

    def moved(self: T, group: Any, g: Any) -> T:
        """g . batch, for elements g with one sample per input: every field with a layout moves.

        NotImplementedError for a class without `layouts`.
        """
        if self.layouts is None:
            raise NotImplementedError(f"{type(self).__name__}: layouts must name the layouts of the fields that move")
        _check_names(self, "layouts", self.layouts)
        given = {name: x for name in self.layouts if (x := getattr(self, name)) is not None}
        return self.replace(**{name: self.carried(group, g, x, self.layouts[name]) for name, x in given.items()})

    def carried(self, group: Any, g: Any, values: Tensor, layout: str) -> Tensor:
        """g . values, for elements g with one sample per input and values (B, ...) of that layout (`groups.Group`)."""
        return of_one_sample(group.act(g, values, layout))

    def names(self, rows: int) -> Tensor | None:
        """(rows,) int64 keys of fixed noise, one per row (input or node): the field `key`; None: the row numbers."""
        return getattr(self, "key", None)

    def replace(self: T, **changes: Any) -> T:
        """The batch with other values for these fields. TypeError for a name that is no field."""
        values = _values(self)
        if unknown := [name for name in changes if name not in values]:
            raise TypeError(f"{type(self).__name__}.replace: fields must be of {_listed(values)}, got {unknown[0]}")
        return type(self)(**{**values, **changes})

    def to(self: T, *where: Any, **named: Any) -> T:
        """Moved to a device, a floating-point dtype or those of a Tensor, as `Tensor.to`; integers keep their dtype."""
        return _each(_mover(type(self).__name__, *where, **named), self)

    def pin_memory(self: T) -> T:
        """In page-locked memory, for faster copies to a GPU."""
        return _each(Tensor.pin_memory, self)

    @property
    def size(self) -> int:
        return sizes_of(self)["batch"]

    @property
    def dtype(self) -> torch.dtype:
        found = (x.real.dtype for x in _tensors(self) if x.is_floating_point() or x.is_complex())
        return next(found, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        for field in _fields(self):
            x = getattr(self, field.name)
            if x is not None or field.default is MISSING:
                _check_tensor(type(self).__name__, field, x)
                return x.device
        raise ValueError(f"{type(self).__name__}: some field must be a Tensor, got {_listed(_values(self))} all None")


def axes_of(batch: Any) -> dict[str, dict[int, str]]:
    """The names of its fields' sizes, by field and axis (`Batch.axes`); none for a class without axes that is no `Batch`.

    ValueError where they name no field.
    """
    axes = getattr(batch, "axes", None)
    if axes is None:
        return {name: {0: "batch"} for name in _values(batch)} if isinstance(batch, Batch) else {}
    _check_names(batch, "axes", axes)
    return axes


def sizes_of(batch: Any) -> dict[str, int]:
    """Name -> size, of the fields that are there."""
    sizes: dict[str, int] = {}
    there = {field.name: field for field in _fields(batch)}
    for name, axes in axes_of(batch).items():
        x = getattr(batch, name)
        for axis, size in axes.items() if x is not None else ():
            _check_tensor(type(batch).__name__, there[name], x)
            if x.ndim <= axis:
                wanted = f"have {axis + 1} axes or more"
                raise ValueError(f"{type(batch).__name__}: {name} must {wanted}, got {tuple(x.shape)}")
            known, more = named_size(size)
            sizes.setdefault(known, x.shape[axis] - more)
    return sizes


def named_size(size: str) -> tuple[str, int]:
    """ "batch" -> ("batch", 0), "batch + 1" -> ("batch", 1)."""
    name, _, more = size.partition(" + ")
    return name, int(more or 0)


def of_one_sample(values: Tensor) -> Tensor:
    """(B, 1, ...) -> (B, ...). ValueError for more samples: a batch is moved by one element per graph."""
    if values.shape[1] != 1:
        raise ValueError(f"moved: g must have one sample per graph, (B, 1), got {values.shape[1]}")
    return values[:, 0]


def _fields(batch: Any) -> tuple[Field, ...]:
    """The dataclass's fields. TypeError for an object of another class."""
    if not is_dataclass(batch):
        kind = type(batch).__name__
        raise TypeError(f"{kind}: must be a dataclass, got a class without @dataclass(eq=False) above it")
    return fields(batch)


def _check_annotations(kind: type) -> None:
    """TypeError for a subclass of a dataclass that adds fields and is no dataclass itself."""
    if "__dataclass_fields__" in vars(kind) or not is_dataclass(kind):
        return
    known = {field.name for field in fields(kind)}
    for name, annotation in inspect.get_annotations(kind).items():
        if name not in known and "ClassVar" not in str(annotation):
            got = f"the field {name} in a class without @dataclass(eq=False) above it"
            raise TypeError(f"{kind.__name__}: must be a dataclass, got {got}")


def _check_names(batch: Any, name: str, given: Any) -> None:
    """ValueError where the class attribute `axes` or `layouts` names what is no field, TypeError unless it is a dict."""
    owner = type(batch).__name__
    if given is None:
        return
    if not isinstance(given, dict):
        raise TypeError(f"{owner}: {name} must be a dict by field, got {type(given).__name__}")
    if unknown := [key for key in given if key not in _values(batch)]:
        raise ValueError(f"{owner}: {name} must name fields, of {_listed(_values(batch))}, got {unknown[0]!r}")


def _check_tensor(owner: str, field: Field, x: Any) -> None:
    if not isinstance(x, Tensor):
        wanted = "a Tensor" if field.default is MISSING else "a Tensor or None"
        raise TypeError(f"{owner}: {field.name} must be {wanted}, got {type(x).__name__}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _tensors(batch: Any) -> list[Tensor]:
    return [x for x in _values(batch).values() if isinstance(x, Tensor)]


def _values(batch: Any) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in _fields(batch)}


def _each(function: Callable[[Tensor], Any], batch: T) -> T:
    """The batch with function(x) for every Tensor x."""
    return type(batch)(**{name: function(x) if isinstance(x, Tensor) else x for name, x in _values(batch).items()})


def _flatten(batch: Any) -> tuple[list[Any], list[list[str]]]:
    """What is not None; the names of these fields and of the others."""
    there = {name: x for name, x in _values(batch).items() if x is not None}
    return list(there.values()), [list(there), [field.name for field in _fields(batch) if field.name not in there]]


def _flatten_with_keys(batch: Any) -> tuple[list[Any], list[list[str]]]:
    there, names = _flatten(batch)
    return [(GetAttrKey(name), x) for name, x in zip(names[0], there, strict=True)], names


def _unflatten(kind: type[T], there: Any, names: list[list[str]]) -> T:
    return kind(**dict(zip(names[0], there, strict=True)), **dict.fromkeys(names[1]))


def _mover(
    owner: str,
    *where: torch.device | str | int | torch.dtype | Tensor,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Moves a Tensor to a device, and to a dtype if it is floating point (complex: the complex dtype of such parts).

    TypeError for an integer dtype.
    """
    for one in where:
        if isinstance(one, Tensor):
            device, dtype = one.device, one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (torch.device, str, int)) and not isinstance(one, bool):
            device = one
        elif one is not None:
            raise TypeError(f"{owner}.to: must be a device, a dtype or a Tensor, got {type(one).__name__} {one!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{owner}.to: dtype must be floating point, got {dtype}")

    def moved(x: Tensor) -> Tensor:
        own = dtype if x.is_floating_point() else None
        if dtype is not None and x.is_complex():
            own = torch.promote_types(dtype, torch.complex32)
        return x.to(device=device, dtype=own, non_blocking=non_blocking)

    return moved
