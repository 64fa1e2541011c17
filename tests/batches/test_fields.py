"""Batches as dataclasses and pytrees: torch's tools and other people's trainers take them as they are."""

import copy
import dataclasses
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

import probsym_fast as psf
from tests.helpers.graphs import random_graphs


def graphs(*sizes: int) -> psf.Graphs:
    return random_graphs(sizes or (4, 5), dtype=torch.float32)


def clouds() -> psf.PointClouds:
    return psf.PointClouds(torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(2, 4, 4, 1))


def images() -> psf.Images:
    return psf.Images(torch.randn(2, 3, 4, 5), torch.arange(40).view(2, 4, 5), torch.tensor([3, 1]))


def model() -> psf.Symmetrized:
    learned = psf.distributions.Learned(psf.groups.Symmetric(8), psf.distributions.GIN(2, 8))
    embed = psf.models.FlatGraph(N=8, width=8, node_features=2)
    return psf.Symmetrized(psf.models.MLP([8, 3]), embed, psf.models.MeanReadout(), learned)


def assert_same(found, expected) -> None:
    assert type(found) is type(expected)
    for field in dataclasses.fields(expected):
        x, y = getattr(found, field.name), getattr(expected, field.name)
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("make", [graphs, clouds, images])
def test_replaced_fields(make):
    batch = make()
    first, *others = [field.name for field in dataclasses.fields(batch)]
    x = getattr(batch, first) + 1
    for found in (batch.replace(**{first: x}), dataclasses.replace(batch, **{first: x})):
        assert type(found) is type(batch) and getattr(found, first) is x
        assert all(getattr(found, name) is getattr(batch, name) for name in others)
    kind, names = type(batch).__name__, ", ".join((first, *others))
    with pytest.raises(TypeError, match=f"^{re.escape(f'{kind}.replace: fields must be of {names}, got weights')}$"):
        batch.replace(weights=x)


def test_a_batch_equals_only_itself():
    batch = graphs()
    assert batch == batch and batch != copy.copy(batch) and len({batch, copy.copy(batch)}) == 2


@pytest.mark.parametrize("make", [graphs, clouds, images])
def test_pytrees_hold_the_fields_that_are_there(make):
    batch = make()
    leaves, spec = pytree.tree_flatten(batch)
    assert len(leaves) == 3 and all(isinstance(x, torch.Tensor) for x in leaves)
    assert_same(pytree.tree_unflatten(leaves, spec), batch)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(batch)[0]]
    assert keys == [f".{field.name}" for field in dataclasses.fields(batch)][:3]
    assert pytree.tree_map(lambda x: 2 * x, batch).dtype == batch.dtype


@dataclass(eq=False)
class Labelled(psf.Graphs):
    y: torch.Tensor | None = None


def test_subclasses_with_more_fields():
    given = graphs()
    batch = Labelled(given.x, given.edge_index, given.ptr, y=torch.ones(2))
    assert len(pytree.tree_leaves(batch)) == 4
    assert batch.to(torch.float64).y.dtype == torch.float64
    assert batch.replace(y=None).y is None
    moved = batch.moved(psf.groups.Symmetric(8), psf.groups.Symmetric(8).identity(batch, 1))
    assert_same(moved, batch)


@pytest.mark.parametrize("make", [graphs, clouds, images])
def test_copies_and_files(make, tmp_path):
    batch = make()
    torch.save(batch, tmp_path / "batch.pt")
    for found in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), torch.load(tmp_path / "batch.pt")):
        assert_same(found, batch)


# --- torch ---


def test_compiled_without_a_break():
    batch = graphs()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(batch):
        wide = batch.to(torch.float64).replace(x=batch.x.double() + 1)
        return dataclasses.replace(wide, edge_attr=wide.attributes), pytree.tree_map(lambda x: x + 1, wide)

    found, plus = f(batch)
    wide = batch.to(torch.float64).replace(x=batch.x.double() + 1)
    assert_same(found, wide.replace(edge_attr=wide.attributes))
    assert_same(plus, psf.Graphs(wide.x + 1, wide.edge_index + 1, wide.ptr + 1))


class Predict(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model()

    def forward(self, batch, seed):
        return self.model(batch, 2, seed=seed)[0]


@pytest.mark.parametrize("strict", [True, False])
def test_exported_and_loaded(strict, tmp_path):
    predict, seed = Predict().eval(), torch.tensor(3)
    sizes = [{0: Dim.DYNAMIC}, {1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}]
    with torch.no_grad():
        program = torch.export.export(predict, (graphs(4, 5, 6), seed), dynamic_shapes=(sizes, None), strict=strict)
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2")
        for batch in (graphs(4, 5, 6), graphs(3, 8, 8, 2)):
            assert torch.allclose(loaded.module()(batch, seed), predict(batch, seed), atol=1e-6)


def test_transforms_go_through_batches():
    batch = clouds()
    found = torch.func.grad(lambda batch: batch.positions.square().sum() + batch.edges.sum())(batch)
    assert_same(found, psf.PointClouds(2 * batch.positions, torch.zeros(2, 4, 3), torch.ones(2, 4, 4, 1)))
    many = pytree.tree_map(lambda x: torch.stack([x, x + 1]), batch)
    sizes = torch.vmap(lambda batch: batch.center + batch.velocities.sum(1))(many)
    assert torch.equal(sizes[0], batch.center + batch.velocities.sum(1)) and sizes.shape == (2, 2, 3)


class Sizes(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index + 2, index + 3


def collated(sizes: list[tuple[int, int]]) -> tuple[psf.Graphs, torch.Tensor]:
    flat = [n for pair in sizes for n in pair]
    return graphs(*flat), torch.tensor(flat)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders(workers):
    loader = DataLoader(Sizes(), batch_size=2, collate_fn=collated, num_workers=workers)
    for batch, sizes in loader:
        assert type(batch) is psf.Graphs and batch.num_nodes.tolist() == sizes.tolist()
        batch.check()


def test_loaders_pin_memory(gpu):
    for batch, sizes in DataLoader(Sizes(), batch_size=2, collate_fn=collated, pin_memory=True):
        assert type(batch) is psf.Graphs and batch.x.is_pinned() and batch.ptr.is_pinned() and sizes.is_pinned()


@pytest.fixture
def process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(module: nn.Module, plain: nn.Module) -> list[torch.Tensor]:
    """Of plain's parameters, by a step of the module that wraps it."""
    prediction, penalties = module(graphs(), 2, seed=1)
    (prediction.square().sum() + sum(penalties.values())).backward()
    return [p.grad for p in plain.parameters()]


def test_data_parallel(process):
    """It finds the tensors of (prediction, penalties): a parameter that no loss reads does not hold up the others."""
    plain = model()
    plain.unused = nn.Linear(2, 2)
    expected = gradients(plain, plain)
    wrapped = copy.deepcopy(plain)
    wrapped.zero_grad()
    found = gradients(DistributedDataParallel(wrapped, find_unused_parameters=True), wrapped)
    for x, y in zip(found, expected, strict=True):
        assert (x is None and y is None) or torch.allclose(x, y, atol=1e-6)


def test_fully_sharded(process):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain = model()
    expected = gradients(plain, plain)
    sharded = copy.deepcopy(plain)
    sharded.zero_grad()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64))
    prediction, penalties = sharded(graphs(), 2, seed=1)
    assert prediction.dtype == torch.float64  # it converts the tensors within a batch
    (prediction.square().sum() + sum(penalties.values())).backward()
    for p, y in zip(sharded.parameters(), expected, strict=True):
        assert torch.allclose(p.grad.full_tensor(), y, atol=1e-4)


# --- Lightning and accelerate ---


def test_lightning_moves_and_converts():
    pytest.importorskip("lightning")
    from lightning.fabric.plugins.precision import MixedPrecision
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch.plugins.precision import DoublePrecision

    (found, label), batch = move_data_to_device((graphs(), torch.ones(2)), "meta"), graphs()
    assert type(found) is psf.Graphs and found.ptr.device.type == label.device.type == "meta"
    mixed = MixedPrecision("bf16-mixed", "cpu")
    for precision, dtype in ((DoublePrecision(), torch.float64), (mixed, torch.bfloat16)):
        found = precision.convert_input({"batch": batch})["batch"]
        assert type(found) is psf.Graphs and found.dtype == dtype and found.ptr.dtype == torch.int64
    assert batch.dtype == torch.float32  # its own is as it was


def test_accelerate_moves():
    operations = pytest.importorskip("accelerate.utils.operations")
    found = operations.send_to_device({"batch": graphs(), "labels": torch.ones(2)}, "meta", non_blocking=True)
    assert type(found["batch"]) is psf.Graphs and found["batch"].x.device.type == "meta"
