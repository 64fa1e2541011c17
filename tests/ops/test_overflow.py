"""Numbers that leave the range: the passes show them as the modules do, as NaN, so that a diverged training is seen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from probsym_fast.models import MessagePassing, Transformer, fuse
from probsym_fast.ops._op import OPS

built = pytest.mark.skipif("cpu" not in OPS["transformer"].backends("cpu"), reason="the extension is not built")
TYPES = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}
MODULES = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


@built
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e30), (torch.float64, 1e200)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_norm_whose_variance_overflows(dtype, large, recompute):
    """Its 1 / sqrt(infinity) = 0 would hide it: every output of that sequence is NaN, and the gradients of all parts."""
    net = Transformer(3, 16, 2, 2, 16, 5, 2, recompute=recompute).to(dtype)
    x = torch.randn(20, 5, 3, dtype=dtype)
    x[7, 1, 0] = large
    assert net.why_modules(x) is None
    y = net(x)
    assert y[7].isnan().all() and y[torch.arange(20) != 7].isfinite().all()
    y.sum().backward()
    assert net.embed.weight.grad.isnan().any() and net.blocks[0].up.weight.grad.isnan().any()


@built
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_far_out(name, dtype):
    """Of numbers up to the largest, and of what is none: torch's values, and its slopes."""
    plain = nn.Sequential(nn.Linear(1, 1), MODULES[name](), nn.Linear(1, 1)).to(dtype)
    with torch.no_grad():
        for part in (plain[0], plain[2]):
            part.weight.fill_(1), part.bias.zero_()
    fused = fuse(plain)
    fused.one_pass = True
    far = torch.tensor([1e3, 1e10, 1e30, torch.finfo(dtype).max / 4], dtype=dtype)  # torch's GELU of more is infinite
    x = torch.cat([far, -far, far.new_tensor([-torch.inf, torch.nan, 0.0, -90.0, -800.0])])[:, None]
    assert fused.why_modules(x) is None
    slopes = []
    for net in (fused, plain):
        leaf = x.clone().requires_grad_()
        net(leaf).sum().backward()
        slopes.append(leaf.grad)
    torch.testing.assert_close(fused(x), plain(x), equal_nan=True, rtol=1e-5, atol=1e-30)
    finite = x.isfinite()
    torch.testing.assert_close(slopes[0][finite], slopes[1][finite], rtol=1e-5, atol=1e-6)


@built
def test_messages_far_out():
    net, x, edges = MessagePassing(), torch.randn(4, 4, 5, 6), torch.randn(4, 1, 5, 5, 2)
    x[1, 2] = 1e38
    found = net(x, edges)
    net.one_pass = False
    expected = net(x, edges)
    assert torch.equal(found.isfinite().all((-2, -1)), expected.isfinite().all((-2, -1)))
    assert found[1, 2].isfinite().all() == expected[1, 2].isfinite().all()
