"""Point clouds of molecules: fields that may be missing, points in one list, padding, PyTorch Geometric's data."""

import re

import pytest
import torch
from torch.utils import _pytree as pytree

import probsym_fast as psf
from probsym_fast.groups import Draws, Euclidean, PointClouds, Symmetric
from tests.batches.test_fields import assert_same

COUNTS = torch.tensor([3, 0, 5])


def listed(**fields) -> PointClouds:
    """Clouds of 3, 0 and 5 points."""
    x, v, f = torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 2)
    ptr = torch.tensor([0, 3, 3, 8])
    return PointClouds(**{"positions": x, "velocities": v, "features": f, "ptr": ptr, **fields})


def refused(kind, message: str):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def test_points_of_all_clouds_are_padded():
    x, f = torch.randn(8, 3), torch.randn(8, 2)
    clouds = listed(positions=x, velocities=None, features=f, key=torch.tensor([5, 6, 7]))
    clouds.check()
    assert clouds.positions.shape == (3, 5, 3) and clouds.features.shape == (3, 5, 2)
    assert clouds.size == 3 and clouds.num_nodes.tolist() == [3, 0, 5] and clouds.names(3).tolist() == [5, 6, 7]
    assert torch.equal(clouds.listed(clouds.positions), x) and torch.equal(clouds.listed(clouds.features), f)
    assert torch.equal(clouds.positions[0, :3], x[:3]) and not clouds.positions[~clouds.valid].any()
    assert torch.equal(clouds.padded(x), clouds.positions)
    expected = torch.stack([x[:3].mean(0), torch.zeros(3), x[3:].mean(0)])
    assert torch.allclose(clouds.center, expected, atol=1e-6)
    whole = PointClouds(torch.randn(2, 4, 3))
    assert whole.valid is None and whole.velocities is None and whole.names(2) is None
    assert torch.equal(whole.padded(whole.listed(whole.positions)), whole.positions)


def test_a_fixed_number_of_points():
    """Every batch has n points: from ptr, and from clouds that are padded already, with their edges."""
    ptr, edges = torch.tensor([0, 3, 3, 8]), torch.randn(3, 5, 5, 2)
    fields = dict(zip(("positions", "velocities", "features"), torch.randn(8, 8).split([3, 3, 2], 1), strict=True))
    short, long = (PointClouds(**fields, edges=edges, ptr=ptr, n=n) for n in (None, 7))
    long.check()
    assert long.positions.shape == long.velocities.shape == (3, 7, 3) and long.features.shape == (3, 7, 2)
    assert long.num_nodes.tolist() == [3, 0, 5] and long.edges.shape == (3, 7, 7, 2)
    assert torch.equal(long.edges[:, :5, :5], edges) and not long.edges[:, 5:].any() and not long.edges[:, :, 5:].any()
    again = PointClouds(**named(short), n=7)
    again.check()
    assert_same(again, long)
    whole = PointClouds(torch.ones(2, 4, 3), n=6)
    assert whole.num_nodes.tolist() == [4, 4] and whole.positions[:, 4:].abs().sum() == 0
    assert PointClouds(torch.ones(2, 4, 3), n=4).num_nodes is None
    assert PointClouds(torch.zeros(0, 3), ptr=torch.tensor([0]), n=4).positions.shape == (0, 4, 3)
    assert torch.equal(long.listed(long.positions), short.listed(short.positions))
    x = torch.randn(2, 4, 3)
    inside = torch.compile(lambda x: PointClouds(x, n=6).positions, fullgraph=True, backend="eager")
    assert torch.equal(inside(x), PointClouds(x, n=6).positions)


def named(clouds: PointClouds) -> dict:
    return {name: getattr(clouds, name) for name in PointClouds.axes}


def test_a_number_of_points_that_is_too_small():
    ptr, x = torch.tensor([0, 3, 3, 8]), torch.ones(2, 4, 3)
    for make, kind, message in (
        (lambda: listed(ptr=ptr, n=4), ValueError, "n must be at least the 5 points of cloud 2, got 4"),
        (lambda: PointClouds(x, n=3), ValueError, "n must be at least the 4 points of positions (2, 4, 3), got 3"),
        (lambda: PointClouds(x, n=0), ValueError, "n must be at least 1, got 0"),
        (lambda: PointClouds(x, n=5.0), TypeError, "n must be an int, got float 5.0"),
        (
            lambda: PointClouds(x, features=torch.ones(2, 5, 1), n=6),
            ValueError,
            "features must be (B, n, *) = (2, 4, *), got (2, 5, 1)",
        ),
    ):
        with refused(kind, f"PointClouds: {message}"):
            make()


def test_padding_is_not_read():
    clouds = listed()
    center = clouds.center
    clouds.positions[~clouds.valid] = torch.nan
    assert torch.equal(clouds.center, center)
    none = PointClouds(torch.zeros(0, 3), ptr=torch.tensor([0]))
    none.check()
    assert none.size == 0 and none.positions.shape == (0, 1, 3) and none.center.shape == (0, 3)


def test_gradients_go_through_padding():
    x = torch.randn(8, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(listed(positions=x).positions.square().sum(), x)
    assert torch.equal(grad, 2 * x)


def test_copies_files_and_moves(tmp_path):
    import pickle

    clouds = listed(key=torch.tensor([5, 6, 7]))
    torch.save(clouds, tmp_path / "clouds.pt")
    for found in (pickle.loads(pickle.dumps(clouds)), torch.load(tmp_path / "clouds.pt"), clouds.replace()):
        assert_same(found, clouds)
    leaves, spec = pytree.tree_flatten(clouds)
    assert len(leaves) == 5 and pytree.tree_unflatten(leaves, spec).num_nodes is leaves[3]
    wide = clouds.to(torch.float64)
    assert wide.features.dtype == torch.float64 and wide.num_nodes.dtype == wide.key.dtype == torch.int64


def test_moved():
    """Features go with their nodes, and padding stays where it is."""
    clouds, group = listed(ptr=torch.tensor([0, 3, 8])).to(torch.float64), Symmetric(5) * Euclidean(3)
    g = group.uniform(clouds, 1, Draws(seed=3))
    moved = clouds.moved(group, g)
    assert moved.num_nodes.tolist() == [3, 5] and not moved.features[~clouds.valid].any()
    order = g[0].inverse().order[:, 0]  # of the moved nodes
    assert torch.equal(moved.features, clouds.features.take_along_dim(order[..., None], 1))
    apart = torch.cdist(clouds.positions, clouds.positions)
    both = clouds.valid[:, :, None] & clouds.valid[:, None]
    expected = apart.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None], 2)
    assert torch.allclose(torch.cdist(moved.positions, moved.positions)[both], expected[both])


def test_ptr_is_checked():
    x, ptr = torch.randn(8, 3), torch.tensor([0, 3, 3, 8])
    for fields, message in (
        ({"num_nodes": COUNTS}, "num_nodes must be None with ptr, got (3,)"),
        ({"positions": x[None]}, "positions must be (nodes, d), got (1, 8, 3)"),
        ({"ptr": ptr[:-1]}, "ptr must end with the number of nodes 8, got 3"),
        ({"ptr": torch.tensor([0, 5, 3, 8])}, "ptr must not decrease, got ptr[1] = 5 and ptr[2] = 3"),
        ({"features": torch.randn(7, 2)}, "features must be (nodes, *) = (8, *), got (7, 2)"),
    ):
        with refused(ValueError, f"PointClouds: {message}"):
            listed(**fields)
    with refused(TypeError, "PointClouds: ptr must be an int64 Tensor, got torch.int32"):
        listed(ptr=ptr.int())

    @torch.compile(fullgraph=True, backend="eager")
    def inside(x, ptr):
        return PointClouds(x, ptr=ptr).positions

    with pytest.raises(Exception, match="pad the clouds before, with num_nodes"):
        inside(x, ptr)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_nodes": torch.tensor([3, 6])}, "num_nodes must be in 0..n = 5, got 6"),
        ({"num_nodes": torch.tensor([3])}, "num_nodes must be (B,) = (2,), got (1,)"),
        ({"features": torch.ones(2, 4, 1)}, "features must be (B, n, F) = (2, 5, *), got (2, 4, 1)"),
        ({"velocities": torch.ones(2, 5, 2)}, "velocities must be (B, n, d) = (2, 5, 3), got (2, 5, 2)"),
        ({"key": torch.tensor([1, -1])}, "key must be in 0..2^43 - 1, got -1"),
    ],
)
def test_fields_are_checked(fields, message):
    with refused(ValueError, f"PointClouds: {message}"):
        PointClouds(torch.ones(2, 5, 3), **fields).check()


# --- PyTorch Geometric ---

geometric = pytest.importorskip("torch_geometric.data")


def molecule(*z: int, **fields) -> "geometric.Data":
    return geometric.Data(z=torch.tensor(z), pos=torch.randn(len(z), 3), **fields)


def test_molecules_of_pytorch_geometric():
    data = geometric.Batch.from_data_list([molecule(8, 1, 1, key=4), molecule(6, 1, 1, 1, 1, key=9)])
    data.charge = torch.randn(8, 1)
    clouds = psf.PointClouds.from_data(data, ("z", "charge"), types=(1, 6, 8))
    assert clouds.num_nodes.tolist() == [3, 5] and clouds.key.tolist() == [4, 9] and clouds.velocities is None
    types = clouds.features[..., :3].argmax(-1)[clouds.valid]
    assert types.tolist() == [2, 0, 0, 1, 0, 0, 0, 0] and torch.equal(clouds.listed(clouds.positions), data.pos)
    assert torch.equal(clouds.listed(clouds.features[..., 3:]), data.charge)
    assert psf.PointClouds.from_data(data, "z").features[0, :, 0].tolist() == [8, 1, 1, 0, 0]
    long = psf.PointClouds.from_data(data, ("z", "charge"), types=(1, 6, 8), n=16)
    assert long.positions.shape == (2, 16, 3) and long.features.shape == (2, 16, 4)
    assert torch.equal(long.listed(long.features), clouds.listed(clouds.features))
    with refused(ValueError, "PointClouds: n must be at least the 5 points of cloud 1, got 4"):
        psf.PointClouds.from_data(data, n=4)
    one = psf.PointClouds.from_data(molecule(8, 1, 1, vel=torch.ones(3, 3)))
    assert one.size == 1 and one.features is None and one.velocities.sum() == 9


def test_molecules_that_are_refused():
    for kind, message, data, given in (
        (ValueError, "z must be one of types (1, 6), got 8", molecule(8, 1), {"features": "z", "types": (1, 6)}),
        (
            ValueError,
            "features must name an integer field (nodes,) with types, got []",
            molecule(8, 1),
            {"types": (1, 8)},
        ),
        (ValueError, "q must be (2,) or (2, F), got NoneType; the data hold pos, z", molecule(8, 1), {"features": "q"}),
        (
            ValueError,
            "pos must be (nodes, d) floating point, got NoneType; the data hold x",
            geometric.Data(x=torch.ones(2, 1)),
            {},
        ),
        (
            ValueError,
            "batch must agree with ptr, got batch[1] = 0 in graph 1",
            molecule(8, 1, batch=torch.tensor([0, 0]), ptr=torch.tensor([0, 1, 2])),
            {},
        ),
        (
            TypeError,
            "batch must be one Data or Batch, got list of 1;"
            " join the graphs with torch_geometric.data.Batch.from_data_list",
            [molecule(8)],
            {},
        ),
    ):
        with refused(kind, f"PointClouds.from_data: {message}"):
            psf.PointClouds.from_data(data, **given)
