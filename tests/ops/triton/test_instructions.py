"""Instructions of the compiled kernels: wide loads and stores, tensor cores, nothing read twice."""

import re

import pytest
import torch

from benchmarks.gpu_model.launches import all_compiled, compiled
from tests.ops.triton.cases import launches_of


@pytest.mark.parametrize("name", ["embed", "readout"])
def test_rows_move_in_16_bytes(name, monkeypatch):
    """Token and weight rows of a width divisible by 16 are read, and tokens written, in vectors of 16 bytes."""
    kernels = {"scatter": "BLOCK_D", "gather": "BLOCK_D", "gather_one": "BLOCK_D", "slot_values": "BLOCK_K"}
    for dtype in (torch.float32, torch.bfloat16):
        seen = set()
        for (kernel, _), launch in launches_of(name, dtype, monkeypatch):
            if kernel in kernels and launch.named["D"] == 768 and launch.named[kernels[kernel]] >= 32:
                seen.add(kernel)
                ptx = compiled(launch, 90).asm["ptx"]
                wide = r"cp\.async\S* \[.*\], 0x10" if kernel == "slot_values" else r"ld\.global\S*\.v4\.b32"
                assert re.search(wide, ptx), (kernel, launch[1:])
                assert kernel != "scatter" or re.search(r"st\.global\S*\.v4\.b32", ptx), (kernel, launch[1:])
        assert {"scatter", "gather"} | ({"gather_one"} if name == "readout" else set()) <= seen, seen


def test_features_of_nodes_move_in_16_bytes(monkeypatch):
    """Of a width that 16 divides: rows of the weight, and what is written."""
    for dtype in (torch.float32, torch.bfloat16):
        (launch,) = [
            launch
            for (kernel, _), launch in launches_of("node_identifiers", dtype, monkeypatch)
            if kernel == "rows_of_nodes" and launch.named["D"] == 64 and launch.named["TILE"] == 8192
        ]
        ptx = compiled(launch, 90).asm["ptx"]
        for access in ("ld", "st"):
            assert re.search(rf"{access}\.global\S*\.v4\.b32", ptx), (access, dtype)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32")])
def test_products_are_on_the_tensor_cores(dtype, precision, monkeypatch):
    """In half precision; in float32 as three of tf32, or where torch lets its own products be in tf32. Bytes move in 16."""
    seen = {}
    for name in ("embed_matrix", "node_identifiers", "embed"):
        for (kernel, _), launch in launches_of(name, getattr(torch, dtype), monkeypatch, (precision,)):
            seen.setdefault(f"{kernel} of embed" if name == "embed" else kernel, launch)
    for kernel in ("multiply", "multiply of embed", "multiply_transposed", "reduce_matrix", "reduce_identifiers"):
        ptx = compiled(seen[kernel], 90).asm["ptx"]
        cores = re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None
        whole = dtype == "float32" and precision == "ieee"  # the digits of float32
        assert cores == (not whole or kernel != "reduce_identifiers"), kernel
        if whole and cores:
            assert len(re.findall(r"(wgmma\.mma_async|mma\.sync)\S*tf32", ptx)) >= 3, kernel
        if dtype == "bfloat16" and kernel in ("multiply", "multiply of embed"):
            assert re.search(r"cp\.async\S* \[.*\], 0x10", ptx) and re.search(r"st\.global\S*\.v4\.b32", ptx)


@pytest.mark.parametrize(("name", "reads", "once"), [("embed_image", 4, 4), ("embed_turned", 1, 1)])
def test_a_place_reads_its_pixels_once(name, reads, once, monkeypatch):
    """In each channel, and is written once; coordinates are not computed again for a channel. Two places a thread."""
    channels, places = 3, 2
    for (kernel, _), launch in launches_of(name, torch.float32, monkeypatch):
        if kernel.startswith("cut") and launch.named.get("p_slopes") is None and not launch.named.get("REPLICATE"):
            made = compiled(launch, 90)
            assert len(re.findall(r"ld\.global", made.asm["ptx"])) == once + reads * channels * places
            assert len(re.findall(r"st\.global\S*\.v2\.b32", made.asm["ptx"])) == channels
            return
    raise AssertionError("no launch writes patches")


NETWORKS = {"gin": 6, "message_passing": 6, "mlp": 3, "transformer": 6, "vector_edge_convolution": 10}  # op -> kernels

OF_CHANNELS = {"parameters", "statistics", "channel_gradients", "weight_gradients"}  # of vector_edge_convolution

NO_PRODUCTS = {"sum_rows", "pool", "activate", "nearest", "norm_moments", "chosen", "chosen_gradient"}
NO_PRODUCTS |= {"count", "fill", "maps_gradient", *OF_CHANNELS}

NARROW_READS = {"count", "fill", "nearest", *OF_CHANNELS}  # of integers, and of clouds, in whatever number

NARROW_WRITES = NARROW_READS | {"sum_rows", "pool", "norm_moments", "choose", "chosen"}
NARROW_WRITES |= {"attention", "attention_gradient"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_on_the_tensor_cores(name, precision, monkeypatch):
    """Where torch lets its own products be in tf32; at widths divisible by 4 all weights and rows are read in 16 bytes."""
    launches = launches_of(name, torch.float32, monkeypatch, (precision,))
    assert len({kernel for (kernel, _), _ in launches}) == NETWORKS[name]
    for ((kernel, _), launch), made in zip(launches, all_compiled([x for _, x in launches], 90), strict=True):
        ptx = made.asm["ptx"]
        cores = re.search(r"wgmma\.mma_async|mma\.sync", ptx) is not None
        assert cores == (precision == "tf32" and kernel not in NO_PRODUCTS), kernel
        wide = re.search(r"ld\.global\S*\.v4\.b32|cp\.async\S* \[.*\], 0x10", ptx)
        assert wide or kernel in NARROW_READS, (kernel, launch[1:])
        assert re.search(r"st\.global\S*\.v4\.b32", ptx) or kernel in NARROW_WRITES, (kernel, launch[1:])
