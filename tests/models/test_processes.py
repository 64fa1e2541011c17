"""Samples spread over processes: gloo on the CPU against one process."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from probsym_fast import Symmetrized
from probsym_fast.distributions import GIN, Learned, Uniform, VectorNeurons
from probsym_fast.groups import Euclidean, PointClouds, Symmetric
from probsym_fast.models import FlatGraph, NodeReadout, NodeVectors, SlotReadout
from probsym_fast.models.backbones.message_passing import MessagePassing
from probsym_fast.models.chunks import Chunks
from probsym_fast.models.processes import _Sum, share
from tests.helpers.graphs import random_graphs

SIZES = [5, 3, 4, 5, 2, 4, 3, 5]  # nodes of eight graphs


def graph_model(dropout: float = 0.0) -> Symmetrized:
    """A learned distribution with BatchNorm over all samples, soft permutations, a readout at the nodes."""
    embed = FlatGraph(N=5, width=8, node_features=2)
    backbone = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8))
    return Symmetrized(backbone, embed, SlotReadout(5, 8), Learned(Symmetric(5), GIN(2, width=6, layers=2))).double()


def cloud_model() -> Symmetrized:
    distribution = Learned(Symmetric(5) * Euclidean(3), VectorNeurons(width=6, scores=True, matrices=True))
    network = MessagePassing(6, 2, 8, 2, 3)
    return Symmetrized(network, NodeVectors(), NodeReadout(displacement=False), distribution).double()


def uniform_model() -> Symmetrized:
    network = MessagePassing(6, 2, 8, 2, 3)
    return Symmetrized(network, NodeVectors(), NodeReadout(displacement=False), Uniform(Euclidean(3))).double()


def chunked_model() -> Symmetrized:
    """Shares and chunks cut antithetic pairs."""
    model = graph_model()
    model.draws, model.chunks = "antithetic", Chunks(2)
    return model


def graphs(part: slice):
    batch = random_graphs(SIZES[part], seed=part.start)
    return batch, torch.randn(sum(SIZES[part]), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def clouds(part: slice):
    def draw(*shape):
        return torch.randn(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))[part]

    edges = draw(5, 5, 2)
    return PointClouds(draw(5, 3), draw(5, 3) ** 2, edges + edges.transpose(1, 2)), draw(5, 3)


KINDS = {
    "graphs": (graph_model, graphs),
    "clouds": (cloud_model, clouds),
    "uniform": (uniform_model, clouds),
    "chunked": (chunked_model, graphs),
}
CASES = [  # kind, processes along the data, S, the batch's parts along the data
    ("graphs", 1, 5, (0, 8)),
    ("graphs", 1, 4, (0, 8)),
    ("graphs", 1, 1, (0, 8)),  # fewer samples than processes
    ("clouds", 1, 3, (0, 8)),
    ("uniform", 1, 6, (0, 8)),
    ("chunked", 1, 7, (0, 8)),
    ("graphs", 2, 3, (0, 4, 8)),
    ("clouds", 2, 3, (0, 5, 8)),  # uneven parts
]


def step(model, case, rank: int, scale: float = 1.0):
    """Loss and penalties of one process's part of the batch, weighted by its size; backward done."""
    kind, data, samples, parts = case
    batch, target = KINDS[kind][1](slice(parts[rank], parts[rank + 1]))
    torch.manual_seed(20 + rank)  # the distribution's dropout
    prediction, penalties = model(batch, samples, torch.Generator().manual_seed(10 + rank))
    weight = (parts[rank + 1] - parts[rank]) / parts[-1] * data
    loss = (nn.functional.mse_loss(prediction, target) + 0.1 * sum(penalties.values(), torch.zeros(()))) * weight
    loss.backward()
    return prediction.detach(), loss.detach()


class Structured(nn.Module):
    """Values of the nodes, and a complex mean."""

    def __init__(self):
        super().__init__()
        self.slots = SlotReadout(5, 8)

    def forward(self, outputs, batch, group, g):
        y = outputs.mean(1)
        return {"nodes": self.slots(outputs, batch, group, g), "all": (torch.complex(y, 1 + y),)}


def structured(mesh=None):
    """Predictions and gradients, in one process or spread over a mesh."""
    torch.manual_seed(6)
    model = graph_model()
    model.readout, model.samples_mesh = Structured().double(), mesh
    run = model if mesh is None else DistributedDataParallel(model)
    y, penalties = run(graphs(slice(0, 8))[0], 5, torch.Generator().manual_seed(4))
    (y["nodes"].square().sum() + y["all"][0].abs().square().sum() + sum(penalties.values())).backward()
    return y["nodes"].detach(), y["all"][0].detach(), gradients(model)


def infer(model, case, rank: int):
    """Prediction and penalties in eval mode."""
    kind, _, samples, parts = case
    batch, _ = KINDS[kind][1](slice(parts[rank], parts[rank + 1]))
    drawn = []
    handle = model.distribution.register_forward_hook(lambda _, arguments, __: drawn.append(arguments[1]))
    with torch.no_grad():
        prediction, penalties = model.eval()(batch, samples, torch.Generator().manual_seed(30 + rank))
    handle.remove()
    return prediction, penalties, sum(drawn)


def build(kind: str) -> Symmetrized:
    torch.manual_seed(5)
    return KINDS[kind][0]()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def work(rank: int, processes: int, folder: str) -> None:
    """What one process finds in every case, saved."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    found = []
    for case in CASES:
        kind, data, *_ = case
        mesh = init_device_mesh("cpu", (data, processes // data), mesh_dim_names=("data", "samples"))
        model = build(kind)
        model.samples_mesh = mesh["samples"]
        place = mesh["data"].get_local_rank()
        inferred = infer(model, case, place)
        found.append((*step(DistributedDataParallel(model.train()), case, place), gradients(model), inferred))
    mesh = init_device_mesh("cpu", (processes,), mesh_dim_names=("samples",))
    x = torch.arange(3.0, dtype=torch.float64, requires_grad=True)
    total = partial(_Sum.apply, group=mesh.get_group())
    twice = torch.autograd.gradgradcheck(total, (x,), raise_exception=False)
    jacobians = torch.func.jacrev(total)(x.detach()), torch.func.jacfwd(total)(x.detach())  # with vmap, both of them
    model = graph_model(dropout=0.5)
    model.samples_mesh = mesh
    torch.manual_seed(3)
    seen = []
    model.backbone[1].register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    model(graphs(slice(0, 8))[0], processes, torch.Generator().manual_seed(0))
    after = torch.rand(())
    torch.save((found, twice, seen[0], after, jacobians, structured(mesh)), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_processes_that_share_the_samples_find_what_one_does(tmp_path, processes):
    multiprocessing.start_processes(work, (processes, str(tmp_path)), processes, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for k, case in enumerate(CASES):
        kind, data, *_ = case
        model = build(kind)
        inferred = [infer(model, case, rank) for rank in range(data)]
        expected = [step(model.train(), case, rank) for rank in range(data)]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= data
        near = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
        for rank, (found, *_) in enumerate(ranks):
            prediction, loss, grads, (mean, penalties, drawn) = found[k]
            place, along = divmod(rank, processes // data)
            near(prediction, expected[place][0], msg=f"{case} {rank}")
            near(loss, expected[place][1])
            near((mean, penalties), inferred[place][:2])
            assert drawn == max(1, share(case[2], along, processes // data)[1])  # its own samples alone
            near(grads, gradients(model))
            assert any(grad.abs().max() > 1e-3 for grad in grads)
    for *_, found in ranks:
        near(found, structured())
    for _, twice, _, after, jacobians, _ in ranks:
        assert twice
        assert all(torch.equal(x, processes * torch.eye(3, dtype=torch.float64)) for x in jacobians)
        assert torch.equal(after, ranks[0][3])  # the generators are in step again
    masks = [mask for _, _, mask, *_ in ranks]
    assert all(not torch.equal(a, b) for a, b in pairwise(masks))  # dropout is each process's own


@pytest.mark.parametrize("samples", range(1, 12))
@pytest.mark.parametrize("processes", range(1, 6))
def test_shares_cover_the_samples(samples, processes):
    shares = [share(samples, rank, processes) for rank in range(processes)]
    assert [s for first, count in shares for s in range(first, first + count)] == list(range(samples))
    counts = [count for _, count in shares]
    assert max(counts) - min(counts) <= 1


def test_a_mesh_of_two_dimensions_is_refused():
    class Mesh:
        ndim = 2

    model = uniform_model()
    model.samples_mesh = Mesh()
    with pytest.raises(ValueError, match=r"Symmetrized: samples_mesh must have one dimension, got 2"):
        model(clouds(slice(0, 8))[0], 2)


@pytest.mark.parametrize(("mode", "drawn"), [("eval", 2), ("a part in training", 4), ("gradients", 4)])
def test_samples_that_may_see_each_other_are_drawn_together(monkeypatch, mode, drawn):
    class Mesh:
        ndim, device_type = 1, "cpu"
        size, get_local_rank, get_group = lambda _: 2, lambda _: 1, lambda _: None

    monkeypatch.setattr(_Sum, "apply", lambda x, group: x)
    model, asked = graph_model().eval(), []
    model.samples_mesh = Mesh()
    model.distribution.train(mode == "a part in training")
    model.distribution.register_forward_hook(lambda _, arguments, __: asked.append(arguments[1]))
    with torch.set_grad_enabled(mode == "gradients"):
        model(graphs(slice(0, 8))[0], 4)
    assert asked == [drawn]
