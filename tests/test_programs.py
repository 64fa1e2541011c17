"""Programs recorded from whole models: seeds, chunks, and what is refused. tests/programs has every model and tool."""

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from probsym_fast import Symmetrized, groups, models
from probsym_fast.distributions import GIN, Learned, UniformNoise, VectorNeurons
from tests.helpers.graphs import random_graphs

S = 3
SEED = torch.tensor(2**61 + 5)


def graphs(*sizes: int) -> groups.Graphs:
    return random_graphs(sizes, dtype=torch.float32)


def tensors(*sizes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = graphs(*sizes)
    return batch.x, batch.edge_index, batch.ptr


def clouds(B: int = 4) -> groups.PointClouds:
    return groups.PointClouds(torch.randn(B, 5, 3), torch.randn(B, 5, 3), torch.randn(B, 5, 5, 2))


def graph_model(N: int, *parts: nn.Module) -> Symmetrized:
    return Symmetrized(*parts, Learned(groups.Symmetric(N), GIN(2, width=16), UniformNoise()))


def flat_mlp():
    pieces = models.MLP([16, 16, 3]), models.FlatGraph(N=8, width=16, node_features=2), models.MeanReadout()
    return graph_model(8, *pieces), graphs(5, 6, 7, 8)


def gin_with_identifiers():
    pieces = models.GINBackbone(16, 3, 4, "relu"), models.IdentifiedNodes(8, 16, 2), models.MeanReadout()
    return graph_model(8, *pieces), graphs(5, 6, 7, 8)


def points_gnn():
    network = VectorNeurons(width=8, scores=False, dropout=0.0)  # eager and compiled programs drop others
    pieces = models.MessagePassing(width=16, layers=1), models.NodeVectors(), models.NodeReadout(displacement=False)
    return Symmetrized(*pieces, Learned(groups.Euclidean(3), network)), clouds()


def points_transformer():
    network = VectorNeurons(width=8, dropout=0.0)
    backbone = models.Transformer(width=16, layers=1, feedforward=16, read=range(0, 25, 6))
    pieces = backbone, models.PairTokens(), models.NodeReadout(displacement=True)
    return Symmetrized(*pieces, Learned(groups.Symmetric(5) * groups.Euclidean(3), network, tau=0.1)), clouds()


class Program(nn.Module):
    """A graph model as a program of tensors."""

    def __init__(self, model: Symmetrized):
        super().__init__()
        self.model = model

    def forward(self, x, edge_index, ptr, seed=None):
        return self.model(groups.Graphs(x, edge_index, ptr), S, seed=seed)[0]


@pytest.fixture
def program():
    """An exported model, of any numbers of nodes, edges and graphs, and the model."""
    model = flat_mlp()[0].eval()
    inputs = *tensors(5, 6, 7), SEED
    sizes = {0: Dim("nodes", min=4)}, {1: Dim("edges", min=2)}, {0: Dim("offsets", min=3)}
    with torch.no_grad():
        return torch.export.export(Program(model), inputs, dynamic_shapes=(*sizes, None)), Program(model)


def check_program(run, model) -> None:
    for sizes, seed in (((5, 6, 7), 3), ((8, 3, 4, 8, 2), 2**61)):
        inputs = *tensors(*sizes), torch.tensor(seed)
        with torch.no_grad():
            expected = model(*inputs)
            assert torch.allclose(run(*inputs), expected, atol=1e-6)
            assert not torch.allclose(run(*inputs[:3], torch.tensor(seed + 1)), expected, atol=1e-6)


def test_an_exported_model_takes_seeds_and_other_sizes(program):
    check_program(program[0].module(), program[1])


@pytest.mark.slow
def test_through_aot_inductor_and_back(program, tmp_path):
    exported, model = program
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    check_program(torch._inductor.aoti_load_package(path), model)


def test_every_run_of_a_recording_without_a_seed_draws_its_own():
    model = flat_mlp()[0].eval()
    inputs = tensors(5, 6, 7)
    with torch.no_grad():
        run = torch.export.export(Program(model), inputs).module()
        assert not torch.equal(run(*inputs), run(*inputs))


def test_generators_are_refused_where_programs_are_recorded():
    model, batch = flat_mlp()
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="Draws: a generator cannot be recorded; pass seed="):
            torch.export.export(model, (batch, S), {"generator": generator})
        torch._dynamo.reset()
        with pytest.raises(Exception, match="a generator cannot be recorded; pass seed="):
            torch.compile(model, fullgraph=True, backend="eager")(batch, S, generator=generator)


def test_seeds_do_not_compile_anew():
    """Neither ints nor tensors, and the ints give the eager numbers."""
    model, batch = points_gnn()
    model = model.eval()
    for seeds in ([3, 4, 2**40, 17, 2**62, 5, 2**63 + 1, -1], [torch.tensor(x) for x in (1, 2, 3)]):
        torch._dynamo.reset()
        counter = CompileCounter()
        program = torch.compile(model, backend=counter, fullgraph=True)
        with torch.no_grad():
            for seed in seeds:
                torch.testing.assert_close(program(batch, S, seed=seed)[0], model(batch, S, seed=seed)[0])
        assert counter.frame_count <= 4, counter.frame_count  # one a sign of the 64 bits, and one before ints vary


def test_inference_in_chunks_is_one_program():
    model, batch = flat_mlp()
    model = model.eval()
    model.chunk = 2
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(batch, S, seed=SEED)[0]
        torch.testing.assert_close(found, model(batch, S, seed=SEED)[0])  # eager runs few rows by modules


def test_traces_are_refused():
    program, inputs = Program(flat_mlp()[0].eval()), tensors(5, 6, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, which is deprecated
        with pytest.raises(
            RuntimeError, match=r"Draws: torch\.jit\.trace would freeze the random numbers; use torch\.export"
        ):
            torch.jit.trace(program, inputs, check_trace=False)
