"""`psf.export`: programs of tensors, run by torch in another process and by C++. tests/programs has those of ONNX."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import probsym_fast as psf
from tests.helpers.graphs import random_graphs
from tests.test_programs import clouds, flat_mlp, gin_with_identifiers, graphs, points_gnn

S = 3
SIZES = (8, 3, 4, 8, 2), (5,), (5, 6, 7)


def uniform_points():
    group = psf.groups.Symmetric(5) * psf.groups.SpecialEuclidean(3)
    backbone = psf.models.Transformer(width=16, layers=1, heads=2, feedforward=16, read=range(0, 25, 6))
    pieces = backbone, psf.models.PairTokens(), psf.models.NodeReadout(displacement=True)
    return psf.Symmetrized(*pieces, psf.distributions.Uniform(group)), clouds()


def tensors(batch, program) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in program.graph_signature.user_inputs[:-1]]


def check(run, program, model, batches) -> None:
    """The model's numbers, for other sizes and seeds, one graph among them."""
    with torch.no_grad():
        for batch in batches:
            for seed in (torch.tensor(3), torch.tensor(-(2**61))):
                expected = model(batch, S, seed=seed)[0]
                assert torch.allclose(run(*tensors(batch, program), seed), expected, atol=1e-5)
                if batch.size > 1:  # one small graph may get the same permutations
                    assert not torch.allclose(run(*tensors(batch, program), seed + 1), expected, atol=1e-5)


def ops_of_ours(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("probsym_fast")]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [flat_mlp, gin_with_identifiers])
def test_graphs(make, strict):
    model, batch = make()
    program = psf.export(model.eval(), batch, S, strict=strict)
    assert program.graph_signature.user_inputs == ("x", "edge_index", "ptr", "seed")
    assert ops_of_ours(program)
    check(program.module(), program, model, [graphs(*sizes) for sizes in SIZES])


def test_every_field_that_is_there():
    learned = psf.distributions.Learned(psf.groups.Symmetric(8), psf.distributions.GIN(2, 8))
    embed = psf.models.FlatGraph(N=8, width=8, node_features=2, edge_features=3)
    model = psf.Symmetrized(psf.models.MLP([8, 3]), embed, psf.models.MeanReadout(), learned).eval()

    def batch(*sizes):
        made = random_graphs(sizes, dtype=torch.float32, edge_features=3)
        key, frame = torch.arange(len(sizes)) + 4, torch.zeros(sum(sizes)).long()
        return made.replace(key=key, frame=frame, pairs=made.edge_index[:, ::2])

    program = psf.export(model, batch(4, 5, 6), S)
    assert program.graph_signature.user_inputs[3:] == ("edge_attr", "key", "frame", "pairs", "seed")
    check(program.module(), program, model, [batch(*sizes) for sizes in SIZES])


def test_point_clouds():
    model, batch = uniform_points()
    program = psf.export(model.eval(), batch, S)
    assert program.graph_signature.user_inputs == ("positions", "velocities", "edges", "seed")
    check(program.module(), program, model, [clouds(7), clouds(1)])
    model, batch = points_gnn()
    program = psf.export(model.eval(), batch, S, dynamic=())
    check(program.module(), program, model, [clouds()])


def test_sizes_that_are_not_dynamic():
    model, batch = flat_mlp()
    program = psf.export(model.eval(), batch, S, dynamic=["nodes"])
    other = graphs(5, 6, 7, 7)
    with pytest.raises(AssertionError, match="edge_index"):
        program.module()(*tensors(other, program), torch.tensor(1))


# --- other processes ---

OTHER_PROCESS = """
import sys
import torch
{imports}
program = torch.export.load("program.pt2")
inputs, expected = torch.load("numbers.pt")
with torch.no_grad():
    found = program.module()(*inputs)
assert torch.allclose(found, expected, atol=1e-5), found - expected
print([name for name in sys.modules if name.startswith("probsym_fast")] != [])
"""


@functools.cache  # the noise without overflow is 1000 nodes
def reference_program() -> tuple:
    """The flat MLP and its program without ops of this package, for other processes."""
    model, batch = flat_mlp()
    return model, psf.export(model.eval(), batch, S, backend="reference")


@pytest.mark.parametrize(("backend", "imports"), [("auto", "import probsym_fast.ops"), ("reference", "")])
def test_a_saved_program_in_another_process(backend, imports, tmp_path):
    if backend == "reference":
        model, program = reference_program()
    else:
        model, batch = flat_mlp()
        program = psf.export(model.eval(), batch, S, backend=backend)
    assert bool(ops_of_ours(program)) == (backend == "auto")
    torch.export.save(program, tmp_path / "program.pt2")
    other, seed = graphs(8, 3), torch.tensor(7)
    with torch.no_grad():
        torch.save(((*tensors(other, program), seed), model(other, S, seed=seed)[0]), tmp_path / "numbers.pt")
    command = [sys.executable, "-c", OTHER_PROCESS.format(imports=imports)]
    environment = os.environ | {"PYTHONPATH": str(Path(psf.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(backend == "auto")  # a reference program needs nothing of this package


MAIN = """
#include <ATen/ATen.h>  // torch/torch.h takes twice as long to compile
#include <c10/core/GradMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <iomanip>
#include <iostream>

int main(int, char** arguments) {
  c10::NoGradGuard no_gradients;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  auto x = at::arange(10, at::kFloat).reshape({5, 2}) / 10;
  auto edges = at::tensor({0, 1, 3, 4, 1, 0, 4, 3}, at::kLong).reshape({2, 4});
  auto ptr = at::tensor({0, 3, 5}, at::kLong);
  auto found = model.run({x, edges, ptr, at::tensor(7, at::kLong).reshape({})})[0].flatten();
  std::cout << std::setprecision(9);
  for (int64_t i = 0; i < found.numel(); ++i) std::cout << found[i].item<float>() << ' ';
}
"""


@pytest.mark.slow
def test_in_cpp(tmp_path):
    """AOTInductor's package, in a program of C++ without Python."""
    from torch.utils import cpp_extension

    model, program = reference_program()
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    check(torch._inductor.aoti_load_package(package), program, model, [graphs(*sizes) for sizes in SIZES])
    (tmp_path / "main.cpp").write_text(MAIN)
    folders = cpp_extension.library_paths()
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = [f"-I{x}" for x in cpp_extension.include_paths()] + [f"-L{x}" for x in folders]
    flags += [f"-Wl,-rpath,{x}" for x in folders] + ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-O0", abi, "main.cpp", "-o", "main", *flags], cwd=tmp_path, check=True)
    done = subprocess.run(["./main", package], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x, edges = torch.arange(10.0).reshape(5, 2) / 10, torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]])
    with torch.no_grad():
        expected = model(psf.Graphs(x, edges, torch.tensor([0, 3, 5])), S, seed=7)[0]
    assert torch.allclose(torch.tensor([float(x) for x in done.stdout.split()]), expected.flatten(), atol=1e-5)


# --- refused ---


class Tuple(NamedTuple):
    """A user's batch that is no dataclass."""

    positions: torch.Tensor

    def check(self) -> None: ...


def refused(error, message: str, *arguments, **named) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'export: {message}')}"):
        psf.export(*arguments, **named)


def test_refused():
    model, batch = flat_mlp()
    refused(
        ValueError, "model must be in eval mode, got training mode of the model; call model.eval()", model, batch, S
    )
    model.eval()
    refused(TypeError, "model must be a Symmetrized, got MLP", model.backbone, batch, S)
    refused(TypeError, "example must be Graphs, PointClouds or another batch with a check method", model, batch.x, S)
    refused(TypeError, "example must be a dataclass of tensors, got Tuple", model, Tuple(batch.x), S)
    refused(ValueError, "samples must be at least 1, got 0", model, batch, 0)
    names = "('nodes', 'edges', 'batch')"
    refused(
        ValueError,
        f"dynamic must name some of {names} for this Graphs, got 'pairs'",
        model,
        batch,
        S,
        dynamic=["pairs"],
    )
    refused(TypeError, "dynamic must be a sequence of names, got the str 'nodes'", model, batch, S, dynamic="nodes")
    named = "('batch', 'points') for this PointClouds, got 'nodes'"
    points, few = uniform_points()
    refused(ValueError, f"dynamic must name some of {named}", points.eval(), few, S, dynamic=["batch", "nodes"])
    message = "example must have a size of at least 2 where it is dynamic, got batch = 1"
    refused(ValueError, message, model, graphs(5), S)
    psf.export(model, graphs(5), S, dynamic=["nodes", "edges"])
    refused(
        ValueError, "backend must be one of ('auto', 'reference', 'onnx'), got 'cpu'", model, batch, S, backend="cpu"
    )
    refused(TypeError, "strict must be a bool, got str 'no'", model, batch, S, strict="no")
    model.chunk = "auto"
    refused(ValueError, "chunk must be a number or None in a program, got 'auto'; set model.chunk", model, batch, S)


def test_a_model_that_fixes_a_size():
    class Fixed(torch.nn.Module):
        def forward(self, outputs, batch, group, g):
            return outputs.mean(1) * torch.ones(4, 1)

    model, batch = flat_mlp()
    model.readout = Fixed()
    refused(ValueError, "dynamic must leave out sizes that the model fixes, got 'batch'", model.eval(), batch, S)


def test_any_number_of_points_up_to_a_largest():
    """Molecules padded to another size than the example's; the largest is that of the Transformer's op."""
    torch.manual_seed(0)

    def molecules(*sizes: int) -> psf.PointClouds:
        nodes = sum(sizes)
        ptr = torch.tensor([0, *sizes]).cumsum(0)
        return psf.PointClouds(torch.randn(nodes, 3), features=torch.rand(nodes, 2), ptr=ptr)

    example = molecules(4, 5, 3)
    network = psf.models.Transformer(5, 16, 1, 2, 16, tokens=None, out_features=1)
    model = psf.symmetrize(network, psf.groups.Euclidean(3), example).eval()
    program = psf.export(model, example, 4, dynamic={"batch": None, "points": 64}).module()
    other = molecules(7, 2, 9, 6)
    found = program(other.positions, other.features, other.num_nodes, torch.tensor(3))
    torch.testing.assert_close(found, model(other, samples=4, seed=3)[0])
    with pytest.raises(
        ValueError, match=re.escape("export: dynamic['points'] must be at least the example's 5, got 4")
    ):
        psf.export(model, example, 4, dynamic={"points": 4})
