"""What is launched, and what is refused before a launch."""

import pytest
import torch
import triton

from benchmarks.gpu_model.launches import Launches
from probsym_fast.ops._patches import padded_axis
from probsym_fast.ops.triton import _launch, _sort_by_key, soft_permutation
from probsym_fast.ops.triton import _lazy as launcher
from probsym_fast.ops.triton.items import Items, weight_rows
from tests.helpers.gpu_driver import Driver
from tests.ops.triton.inputs import axis_of

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernel would stay compiled for a driver that runs nothing"
)


@without_gpu
def test_a_compiled_kernel_is_launched_without_binding(monkeypatch):
    """The same grid and arguments as by triton; another kernel for what is aligned otherwise, and only then."""
    driver, bound = Driver(), []
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = _launch.kernel({"num_warps": 4})(_sort_by_key._count.function.fn)
    kernel.function.add_pre_run_hook(lambda *arguments, **settings: bound.append(arguments))

    def launch(E, keys, offset=0, block=256):
        key, count, place = (torch.zeros(9000, dtype=torch.int32) for _ in range(3))
        kernel(lambda settings: (E // settings["BLOCK"],), key, count[offset:], place, E, keys, BLOCK=block)
        grid, arguments = driver.launched[-1]
        assert grid == (E // block, 1, 1) and len(arguments) == len(kernel.parameters)
        given = key.data_ptr(), count.data_ptr() + 4 * offset, place.data_ptr(), E, keys, block
        assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments] == list(given)

    for E, keys in ((512, 7), (1025, 16), (300, 1), (2048, 40)):
        launch(E, keys)
    assert len(bound) == 1 and len(driver.launched) == 4
    launch(512, 7, offset=1)
    launch(512, 7, offset=4)
    assert len(bound) == 2
    launch(512, 7, block=512)
    assert len(bound) == 3
    kernel(lambda settings: (0,), *bound[0], BLOCK=256)
    assert len(driver.launched) == 7
    heard = []
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda launched: heard.append(launched.get()))
    launch(512, 7)
    assert [x["name"] for x in heard] == ["_count"] and len(bound) == 3


@without_gpu
def test_numbers_that_differ_in_what_divides_them_have_kernels_of_their_own(monkeypatch):
    """1, multiples of 16, and numbers beyond 32 bits: triton compiles others for each."""
    driver, bound = Driver(), []
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel = _launch.kernel({"num_warps": 4})(soft_permutation._ranks.function.fn)
    kernel.function.add_pre_run_hook(lambda *arguments, **settings: bound.append(arguments))
    order, t, counts = torch.zeros(64, dtype=torch.int64), torch.zeros(64), []
    for N in (17, 18, 32, 48, 1, 19, 64, 1, 2**31 + 1, 2**31 + 2, 2**31 + 16):
        kernel(lambda settings: (1,), order, None, t, order, 1, 5, N, BLOCK=64)
        counts.append(len(bound))
    assert counts == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5] and len(driver.launched) == len(counts)


def test_a_failing_kernel_names_itself_and_the_shapes(monkeypatch):
    def fails(*arguments):
        raise ValueError("no such instruction")

    monkeypatch.setattr(_launch, "launch", fails)
    with pytest.raises(
        RuntimeError, match=r"^aggregate: the kernel count failed on cpu for \[\(3,\).*no such instruction"
    ):
        launcher("aggregate", "forward")(torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int64), None, None)


def test_a_matrix_and_a_weight_of_two_dtypes_are_refused(monkeypatch):
    """A direct call, which nothing converts: patches are copied in words of the matrix."""
    monkeypatch.setattr(_launch, "launch", Launches())
    order, matrix = torch.arange(4).expand(1, 1, 4).contiguous(), torch.zeros(1, 4, 4, 4)
    permutation = order, order, *[None] * 3, 1.0
    for given, weight in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        weights = torch.zeros(6, 4, 2, 2, dtype=weight)
        arguments = matrix.to(given), None, *permutation, *axis_of(4, 2), weights, None
        with pytest.raises(TypeError, match=rf"^embed_matrix: weight must be {given} as matrix is, got {weight}$"):
            launcher("embed_matrix", "forward")(*arguments)


@pytest.mark.parametrize(("axes", "kernel"), [(1, "average_samples"), (2, "gather_one")])
def test_items_of_no_graph_have_no_entries(axes, kernel, monkeypatch):
    """Their values are the bias: a program that looked for entries would read an empty table."""
    launches = Launches()
    monkeypatch.setattr(_launch, "launch", launches)
    axis = axis_of(4, 2)
    order, weight = torch.empty(0, 1, 4, dtype=torch.int64), torch.zeros(6, 1, *[2] * axes)
    items, ptr = torch.zeros(axes, 5, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tokens = torch.zeros(0, 1, 2**axes, 6)
    Items(items, ptr, order, axis[0], axis[1], 2).gather(tokens, 1.0, weight_rows(weight), None)
    found = [x.named["S"] for x in launches.every if x.kernel == kernel]
    assert found and not any(found)


def test_more_than_32_bits_count_is_refused_before_a_launch(monkeypatch):
    def none(*arguments):
        raise AssertionError("launched")

    monkeypatch.setattr(_launch, "launch", none)
    axis = padded_axis(4, 5, "zeros", False, torch.device("meta"))
    with torch.device("meta"):
        order, ptr, many = torch.empty(1, 2**27, 4, dtype=torch.int64), torch.empty(2, dtype=torch.int64), [None] * 3
        items, weight = torch.empty(2, 3, dtype=torch.int64), torch.empty(6, 1, 1, 1)
        calls = {
            "act_orthogonal: channels of all vectors of a graph": (
                torch.empty(1, 2**30, 1, 2),
                torch.empty(1, 1, 1, 1),
            ),
            "embed: tokens": (items, torch.empty(3, 1), ptr, order, order, *many, 1.0, *axis, weight, None),
            "embed_turned: tokens": (
                torch.empty(1, 1, 1, 1),
                torch.empty(1, 2**31, dtype=torch.int64),
                torch.empty(1, 1, 1, 1),
                None,
            ),
            "embed_matrix: tokens": (torch.empty(1, 4, 4, 1), None, order, order, *many, 1.0, *axis, weight, None),
        }
        for message, arguments in calls.items():
            more = (False, False) if "act" in message else ()
            with pytest.raises(ValueError, match=rf"^{message} must be at most 2147482624 on a GPU, got \d+$"):
                launcher(message.split(":")[0], "forward")(*arguments, *more)
