"""Whole models in AOTInductor and in ONNX Runtime: the eager numbers, for other sizes and seeds."""

import pytest
import torch

import probsym_fast as psf
from tests.programs.cases import cases
from tests.programs.rows import SIZES
from tests.programs.rows.inputs import S

OFTEN = {"AOTInductor": [], "ONNX": ["points gnn"]}  # the others run by hand; test_exporting compiles the flat MLP


def whole_models(form: str):
    return pytest.mark.parametrize("row", cases(lambda row: row.whole, often=OFTEN[form]))


def exported(row, backend: str):
    """The program, and (inputs, prediction) for every size."""
    model, names, known = row.part().eval(), None, []
    torch.manual_seed(0)
    batches = [row.sample(size, False)[0] for size in SIZES["batch"]]
    program = psf.export(model, batches[0], S, backend=backend)
    names = program.graph_signature.user_inputs[:-1]
    with torch.no_grad():
        for k, batch in enumerate(batches):
            seed = torch.tensor(2**61 + k)
            inputs = *(getattr(batch, name) for name in names), seed
            known.append((inputs, model(batch, S, seed=seed)[0]))
    return program, known


@pytest.mark.slow
@whole_models("AOTInductor")
def test_in_aot_inductor(row, tmp_path):
    program, known = exported(row, "reference")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for inputs, expected in known:
        torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@whole_models("ONNX")
def test_in_onnx(row, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    runtime = pytest.importorskip("onnxruntime")
    program, known = exported(row, "onnx")
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    names = [x.name for x in session.get_inputs()]
    for inputs, expected in known:
        (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
