"""Finite groups, by a multiplication table or by generators; cyclic and dihedral groups."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from probsym_fast import ops
from probsym_fast._autocast import promoted
from probsym_fast._checks import check_count, check_type, looks_at_values
from probsym_fast.batches import Batch
from probsym_fast.draws import Draws
from probsym_fast.groups._constants import Constant
from probsym_fast.groups._tables import CLOSE, Actions, as_actions, checked_actions, checked_table, equal, generated
from probsym_fast.groups.elements import product
from probsym_fast.groups.group import Group, check_layout, sample_axis
from probsym_fast.groups.images import image_axes, move_along, turns_of
from probsym_fast.ops import Permutation


class Finite(Group):
    """A finite group: elements are the numbers 0, ..., order - 1, tensors (B, S) int64.

    table: (order, order) integers, table[g, h] = g h. actions: how the elements act, for each axis letter (or letters,
    such as "vp") either matrices (order, d, d), real or complex, or permutations (order, n) int64, where g moves what is at
    place j to place permutations[g, j]. Orthogonal matrices (order, 2, 2) under both "h" and "w", such as {"hw": matrices}
    or {"vhw": matrices}, move images (`groups.move_images`). Without actions override `along`, and list the letters in
    `moves`.

    `Finite.generated` makes the table from a few elements. Uniform draws are independent; "antithetic" ones mirror the
    number; "stratified" ones run through all elements in `order` consecutive samples.
    Raises TypeError for other types. ValueError unless the table is closed, has an identity and inverses and is associative,
    and unless the actions multiply as it does (matrices to 1e-6); later for graphs that lack some of the nodes it permutes.
    """

    order: int
    _plane: Constant | None = None  # (order, 2, 2), and as symmetries of a square (order,) if they are
    _turns: Constant | None = None
    _square = False  # whether there are quarter turns among these

    def __init__(self, table: Tensor | list[list[int]], actions: Actions | None = None):
        with torch.device("cpu"):  # whatever the default
            numbers, inverses, self.neutral = checked_table(table)
            self._set(numbers, inverses, checked_actions({} if actions is None else actions, numbers))

    def _set(self, table: Tensor, inverses: Tensor, actions: Mapping[str, Tensor]) -> None:
        self.order, self._table, self._inverses = len(table), Constant(table), Constant(inverses)
        self._actions: dict[str, Constant] = {}
        for letters, x in actions.items():
            if {"h", "w"} <= set(letters) and x.ndim == 3:
                self._set_plane(letters, x)
            self._actions |= dict.fromkeys(letters, Constant(x))
        if actions:
            self.moves = "".join(actions)

    def _set_plane(self, letters: str, matrices: Tensor) -> None:
        wanted = f"Finite: actions[{letters!r}] must be real orthogonal matrices (order, 2, 2) for images"
        if matrices.is_complex() or matrices.shape[1] != 2:
            raise ValueError(f"{wanted}, got {matrices.dtype} {tuple(matrices.shape)}")
        if not equal(matrices @ matrices.mT, torch.eye(2, dtype=matrices.dtype)):
            raise ValueError(f"{wanted}, got others")
        self._plane, turns = Constant(matrices), turns_of(matrices, CLOSE)
        self._turns = None if turns is None else Constant(turns)
        self._square = turns is not None and bool((turns % 2).any())

    @classmethod
    def generated(cls, actions: Actions) -> Finite:
        """The group of all products of some elements, given by how they act: the first axis of `actions` counts them.

        The identity is element 0. Raises as the class; ValueError for more than 4096 elements.

        The symmetries of a square, on vectors and points in the plane:

            turn, flip = [[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]
            D4 = Finite.generated({"vp": torch.tensor([turn, flip])})  # 8 elements
        """
        with torch.device("cpu"):
            given = as_actions(actions, None, "count")
            if not given:
                raise ValueError("Finite: actions must not be empty, got no letters")
            return cls(*generated(given))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.order})"

    @property
    def n(self) -> int | None:
        """The number of nodes that it permutes; None if it does not."""
        nodes = self._actions.get("n")
        return None if nodes is None else nodes.tensor.shape[1]

    def _check(self, batch: Batch) -> None:
        """ValueError unless all n nodes that it permutes are valid (on a GPU only in debug mode)."""
        n, counts = self.n, batch.num_nodes
        if n is not None and counts is not None and looks_at_values(counts) and (counts != n).any():
            graph = int((counts != n).nonzero()[0])
            raise ValueError(f"{self}: every graph must have {n} nodes, got {int(counts[graph])} in graph {graph}")

    def _check_numbers(self, g: Tensor, name: str = "g") -> None:
        """TypeError unless g is an int64 Tensor, ValueError for numbers of no element (on a GPU only in debug mode)."""
        check_type(str(self), name, g, Tensor, "a Tensor")
        if g.dtype != torch.int64:
            raise TypeError(f"{self}: {name} must be int64, got {g.dtype}")
        if looks_at_values(g) and len(bad := g[(g < 0) | (g >= self.order)]):
            raise ValueError(f"{self}: {name} must hold numbers 0 to {self.order - 1}, got {int(bad[0])}")

    def elements(self, batch: Batch) -> Tensor:
        self._check(batch)
        return torch.arange(self.order, device=batch.device).expand(batch.size, -1)

    def identity(self, batch: Batch, samples: int) -> Tensor:
        self._check(batch)
        return torch.full((batch.size, samples), self.neutral, device=batch.device)

    def uniform(self, batch: Batch, samples: int, draws: Draws | None = None) -> Tensor:
        draws = draws or Draws()
        if draws.kind == "stratified":
            return self.in_turn(batch, samples, draws)
        self._check(batch)
        return (self.order * draws.uniform((batch.size, samples), "element", device=batch.device)).long()

    def block(self, kind: str) -> int:
        return {"independent": 1, "antithetic": 2}.get(kind, self.order)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        self._check_numbers(g)
        self._check_numbers(h, "h")
        return self._table.on(g.device)[g, h]

    def inverse(self, g: Tensor) -> Tensor:
        self._check_numbers(g)
        return self._inverses.on(g.device)[g]

    def act(self, g: Tensor, x: Tensor, layout: str, *, inverse: bool = False, mean: bool = False) -> Tensor:
        check_layout(self, layout)
        self._check_numbers(g)
        if g.ndim != 2:
            raise ValueError(f"{self}: g must be (B, S), got {tuple(g.shape)}")
        x = x if sample_axis(x, layout, g.shape) else x[:, None]
        g = self.inverse(g) if inverse else g
        if self._plane is not None and (image := image_axes(self, layout)) is not None:
            dtype = promoted(x.real.dtype if x.is_complex() else x.dtype, torch.float32)
            x = move_along(self, x, image, self.plane(self.inverse(g), dtype), inverse=True)
        for axis, letter in enumerate(layout, start=2):
            if self._plane is not None and letter in "hw":
                continue
            if (known := self._actions.get(letter)) and x.shape[axis] != (size := known.tensor.shape[1]):
                got = (*g.shape, *x.shape[2:])
                raise ValueError(f"{self}: axis {axis} of x must have size {size}, got {got}")
            if letter in (self.moves or ""):
                x = self.along(g, x.movedim(axis, 2), letter).movedim(2, axis)
        x = x.expand(*g.shape, *x.shape[2:])
        return x.mean(1) if mean else x

    def plane(self, g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._plane is None:
            return super().plane(g, dtype)
        self._check_numbers(g)
        return self._plane.on(g.device).to(dtype)[g] if self._turns is None else self._turns.on(g.device)[g]

    def along(self, g: Tensor, x: Tensor, letter: str) -> Tensor:
        """g . x along one axis: g (B, S), x (B, S or 1, size, ...), whose third axis has this letter -> (B, S, size, ...).

        Differentiable in x.
        """
        if letter not in self._actions:
            raise NotImplementedError(f"{self}: along must be overridden for axes {letter!r} without actions")
        action = self._actions[letter].on(g.device)
        if action.ndim == 2:
            order, rank = action[g], action[self.inverse(g)]
            return ops.permute(Permutation(order, None, rank, checked=True), x)
        flat = x.reshape(*x.shape[:2], 1, x.shape[2], math.prod(x.shape[3:]))
        if action.is_complex() or x.is_complex():
            check_complex(self, x, action)
            y = product(action[g][:, :, None], flat).to(x.dtype)
        else:
            y = ops.act_orthogonal(flat[:, 0] if x.shape[1] == 1 else flat, action[g])
        return y.reshape(*g.shape, *x.shape[2:])


def check_complex(owner: Group, x: Tensor, matrices: Tensor) -> None:
    """TypeError for complex matrices on real data."""
    if matrices.is_complex() and not x.is_complex():
        raise TypeError(f"{owner}: x must be complex, got {x.dtype}")


class _Polygon(Finite):
    """What Cyclic and Dihedral share: turns of the plane, and shifts of axes with n places."""

    def __init__(self, n: int, axes: str = "vp"):
        owner = type(self).__name__
        n = check_count(owner, "n", n)
        check_type(owner, "axes", axes, str, "a str")
        if not axes or "c" in axes or len(set(axes)) < len(axes):
            raise ValueError(f"{owner}: axes must be different letters but 'c', got {axes!r}")
        self._printed = f"{owner}({n})" if axes == "vp" else f"{owner}({n}, {axes!r})"
        with torch.device("cpu"):
            table, inverses, plane, places = self._parts(n)
            self.neutral = 0
            actions = {letter: plane if letter in "vp" else places for letter in axes}
            if set("vp") & set(axes) and not set("hw") & set(axes):
                actions["hw"] = plane
            self._set(table, inverses, actions)

    def __repr__(self) -> str:
        return self._printed

    @staticmethod
    @abstractmethod
    def _parts(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The table, the inverses, the matrices in the plane and the permutations of n places."""


class Cyclic(_Polygon):
    """C_n: element k turns by k/n of a full turn.

    axes: letters of the axes that it moves. Vectors "v" and points "p", of two coordinates, are rotated (exactly for
    multiples of 90 degrees), and with them images, axes "h" and "w". Any other axis, such as nodes "n", has n places and is
    shifted by k: what is at place j goes to place j + k. The default acts on the plane only; `Cyclic(6, "n")` shifts six
    nodes.
    Raises TypeError unless n is an int and axes a str, ValueError for n below 1 and for axes with "c" or none.
    """

    @staticmethod
    def _parts(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k = torch.arange(n)
        table = (k[:, None] + k) % n
        return table, -k % n, turns(n), table


class Dihedral(_Polygon):
    """D_n, of order 2n: element k < n turns as in `Cyclic`, and element n + k reflects before it turns by k.

    The reflection negates the second coordinate of vectors and points, and takes place j of other axes to place -j (mod n).
    n, axes and errors as in `Cyclic`.
    """

    @staticmethod
    def _parts(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = torch.arange(2 * n)
        k, flip = number % n, number // n
        sign = 1 - 2 * flip[:, None]  # a reflection reverses the turns that it comes after
        table = (k[:, None] + sign * k) % n + n * (flip[:, None] ^ flip)
        mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
        plane = torch.cat([turns(n), turns(n) @ mirror])
        places = (k[:, None] + sign * torch.arange(n)) % n
        return table, torch.where(flip > 0, number, -k % n), plane, places


def turns(n: int) -> Tensor:
    """(n, 2, 2) float64: the rotations by multiples of 360 / n degrees; exact where these are multiples of 90."""
    angle = 2 * math.pi / n * torch.arange(n, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    quarter = 4 * torch.arange(n)
    exact, right = quarter % n == 0, quarter // n % 4
    cos = torch.where(exact, torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)[right], cos)
    sin = torch.where(exact, torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[right], sin)
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
