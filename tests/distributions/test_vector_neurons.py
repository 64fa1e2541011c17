"""Vector Neurons against a direct implementation with concatenated pairs, and the gradients of the fused steps."""

import re

import pytest
import torch
from torch.nn import functional as F

from probsym_fast._memory import peak_memory
from probsym_fast.distributions import VectorNeurons, vector_layers, vector_nodes, vector_steps
from probsym_fast.groups import PointClouds
from tests.conftest import GRADIENT, assert_near


def clouds(count: int, n: int = 5, d: int = 3, dtype: torch.dtype = torch.float64) -> PointClouds:
    return PointClouds(*torch.randn(2, count, n, d, dtype=dtype), torch.zeros(count, n, n, 0, dtype=dtype))


def run(net, batch, noise):
    """With the same dropout masks every time."""
    torch.manual_seed(7)
    return net(batch, noise)


# --- a direct implementation, vectors as (M, n, [k,] w, d) ---


def layer(module, x):
    """Linear, batch normalisation of the norms, leaky ReLU with slope 0.2."""
    p, d = module.feature @ x, module.direction @ x
    norm = (p.square().sum(-1) + 1e-12).sqrt()
    rows = norm.flatten(0, -2)
    bn = module.norm
    statistics = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    new = F.batch_norm(rows, *statistics, bn.weight, bn.bias, bn.training).view_as(norm)
    y = p / norm[..., None] * new[..., None]
    dot = (y * d).sum(-1, keepdim=True)
    projected = y - dot / (d.square().sum(-1, keepdim=True) + 1e-6) * d
    return 0.2 * y + 0.8 * torch.where(dot >= 0, y, projected)


def pool(direction, x):
    """Over axis -3: the vector longest along W x, channel by channel."""
    index = (x * (direction @ x)).sum(-1).argmax(-2)
    return x.gather(-3, index[..., None, :, None].expand(*index.shape[:-1], 1, *x.shape[-2:])).squeeze(-3)


def convolution(module, x, k):
    M, n = x.shape[:2]
    distance = (x[:, :, None] - x[:, None]).square().sum((-1, -2))
    index = distance.topk(min(k, n), largest=False).indices
    neighbor = torch.stack([x[m, index[m]] for m in range(M)])  # (M, n, k, w, d)
    center = x[:, :, None].expand_as(neighbor)
    return pool(module.pool, layer(module, torch.cat([neighbor - center, center], -2)))


def direct(net, batch, noise):
    x = torch.stack([batch.positions - batch.positions.mean(1, keepdim=True), batch.velocities], -2)
    x = (x[:, None] + noise.mT).flatten(0, 1)
    x1 = convolution(net.conv1, x, net.conv1.neighbors)
    matrices = (net.matrix_head @ pool(net.pool, x1)).mT
    x2 = convolution(net.conv2, x1, net.conv2.neighbors)
    x12 = torch.cat([x1, x2], -2)
    x3 = layer(net.conv3, x12)
    x3 = torch.cat([x3, x3.mean(1, keepdim=True).expand_as(x3)], -2)
    frame = net.frame_head @ layer(net.frame2, layer(net.frame1, x3))
    largest = (x3 @ frame.mT).flatten(2).amax(1, keepdim=True).expand(-1, x.shape[1], -1)
    scores = net.score_head(torch.cat([largest, (x12 @ frame.mT).flatten(2)], -1)).squeeze(-1)
    return {"scores": scores.unflatten(0, noise.shape[:2]), "matrices": matrices.unflatten(0, noise.shape[:2])}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("n", "d", "k"), [(5, 3, 4), (1, 3, 4), (6, 2, 3), (3, 3, 7)])
def test_equals_the_direct_form(n, d, k, training, monkeypatch):
    monkeypatch.setattr(vector_steps, "AT_ONCE", 4 * 5 * 4 * n * n * d)  # four clouds at a time
    net = VectorNeurons(width=5, neighbors=k, dropout=0.0, dim=d).double()
    for module in net.modules():
        if isinstance(module, vector_layers.Norm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    batch = clouds(5, n, d)
    noise = torch.randn(net.noise_shape(batch, 2), dtype=torch.float64)
    if not training:
        net(batch, noise)  # moves the running statistics
    net.train(training)
    weights = {
        "scores": torch.randn(5, 2, n, dtype=torch.float64),
        "matrices": torch.randn(5, 2, d, d, dtype=torch.float64),
    }
    gradients = []
    found, expected = net(batch, noise), direct(net, batch, noise)
    for outputs in (found, expected):
        loss = sum((outputs[name] * weight).sum() for name, weight in weights.items())
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    for name, value in expected.items():
        assert_near(found[name], value, {torch.float64: 1e-9})
    for ours, theirs in zip(*gradients, strict=True):
        assert_near(ours, theirs, {torch.float64: 1e-8})


def test_running_statistics_are_those_of_batch_norm():
    norm, x = vector_layers.Norm(4), torch.randn(4, 3, 50)
    norm(x)
    reference = torch.nn.BatchNorm1d(4)
    reference(x.norm(dim=1).mT)
    assert_near(norm.running_mean, reference.running_mean)
    assert_near(norm.running_var, reference.running_var)


# --- the fused steps ---


def inputs(*shapes):
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("width", [1, 2])
def test_gradient_of_the_activation(width):
    f = vector_steps.VectorActivation.apply
    assert torch.autograd.gradcheck(f, inputs((2, 3, 7), (width, 3, 7), (2,), (2,)))


def some_pairs(monkeypatch, n: int = 3, clouds: int = 5) -> torch.Tensor:
    """Which are near, (i, j, M); two clouds at a time."""
    monkeypatch.setattr(vector_steps, "AT_ONCE", 2 * 4 * 2 * 2 * n * n)
    return (torch.rand(n, n, clouds) > 0.3) | torch.eye(n, dtype=torch.bool)[..., None]


def test_gradient_of_the_norm_moments(monkeypatch):
    near, f = some_pairs(monkeypatch), vector_steps.PairNormMoments.apply
    weight, x = inputs((4, 3), (3, 2, 3, 5))
    assert torch.autograd.gradcheck(lambda weight, x: f(near, weight, x), (weight, x))
    assert torch.autograd.gradcheck(lambda weight: f(near, weight, x.detach()), (weight,))
    assert torch.autograd.gradcheck(vector_steps.NormMoments.apply, inputs((2, 2, 3, 5)))


def test_gradient_of_the_edge_activation(monkeypatch):
    near, pool = some_pairs(monkeypatch), torch.randn(2, 2, dtype=torch.float64)
    scale, shift, weight, x = inputs((2,), (2,), (8, 3), (3, 2, 3, 5))
    f = vector_steps.EdgeActivation.apply
    assert torch.autograd.gradcheck(lambda *some: f(near, pool, *some), (scale, shift, weight, x))
    assert torch.autograd.gradcheck(lambda *some: f(near, pool, *some, x.detach()), (scale, shift, weight))


@pytest.mark.parametrize("n", [1, 300])
def test_convolutions_of_one_and_of_many_nodes(n):
    """The neighbour taken is kept in a small integer type, which must hold n."""
    conv = vector_layers.EdgeConvolution(2, 3, 4).double()
    x = torch.randn(2, 3, n, 2, dtype=torch.float64, requires_grad=True)
    weight, parameters, found = torch.randn(3, 3, n, 2, dtype=torch.float64), [x, conv.feature, conv.direction], []
    for y in (conv(x), convolution(conv, x.permute(3, 2, 0, 1), 4).permute(2, 3, 1, 0)):
        found.append([y, *torch.autograd.grad((y * weight).sum(), parameters)])
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, {torch.float64: 1e-8})


@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_of_no_cloud(training):
    conv, x = vector_layers.EdgeConvolution(2, 3, 4).train(training), torch.zeros(2, 3, 5, 0, requires_grad=True)
    before = [t.clone() for t in conv.buffers()]
    y = conv(x)
    y.sum().backward()
    assert y.shape == (3, 3, 5, 0) and x.grad.shape == x.shape
    assert not conv.feature.grad.any() and not conv.direction.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(conv.buffers(), before, strict=True))


def test_convolutions_keep_what_enters_them_alone():
    """For backward: x, which pairs are near and the neighbours taken, a byte each; and nothing of pair size at any time."""
    n, clouds, channels, width = 5, 4096, 4, 21
    conv, kept = vector_layers.EdgeConvolution(channels, width, 4), {}
    x = torch.randn(channels, 3, n, clouds, requires_grad=True)

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = conv(x)
    node = 4 * 3 * n * clouds  # bytes a channel
    assert sum(kept.values()) < channels * node + (n * n + width * n) * clouds + 100_000

    at_once = 4 * vector_steps.AT_ONCE
    enter = channels * node
    assert peak_memory(lambda: y.sum().backward(), "cpu") < 1.3 * at_once + 3 * enter + width * node
    assert peak_memory(lambda: conv(x), "cpu") < 1.3 * at_once + 2 * enter + width * node


def test_backward_under_autocast_changes_nothing():
    """Some leave it on for the backward pass."""
    conv, x = vector_layers.EdgeConvolution(3, 4, 2), torch.randn(3, 3, 5, 7, requires_grad=True)
    loss, inputs = conv(x).square().sum(), [x, *conv.parameters()]
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(mixed, plain, strict=True))


@pytest.mark.parametrize("nodes", [1, 4])
def test_gradient_of_the_largest_invariant(nodes):
    assert torch.autograd.gradcheck(vector_steps.LargestInvariant.apply, inputs((2, 2, nodes, 3), (3, 2, 4, 3)))


def fused_steps(monkeypatch) -> dict:
    """(step of the inputs with a gradient, those inputs)"""
    near, pool = some_pairs(monkeypatch), torch.randn(2, 2, dtype=torch.float64)
    steps, nodes = vector_steps, (vector_nodes.ListedNodes(torch.tensor([4, 3, 1, 1, 0]), 4),)
    return {
        "NormMoments": (steps.NormMoments, (), inputs((2, 2, 3, 5))),
        "PairNormMoments": (steps.PairNormMoments, (near,), inputs((4, 3), (3, 2, 3, 5))),
        "VectorActivation": (steps.VectorActivation, (), inputs((2, 3, 7), (1, 3, 7), (2,), (2,))),
        "EdgeActivation": (steps.EdgeActivation, (near, pool), inputs((2,), (2,), (8, 3), (3, 2, 3, 5))),
        "LargestInvariant": (steps.LargestInvariant, (), inputs((2, 2, 4, 3), (3, 2, 4, 3))),
        "_Listed": (vector_nodes._Listed, nodes, inputs((2, 2, 4, 5))),
        "_Padded": (vector_nodes._Padded, nodes, inputs((2, 2, 9))),
        "_Total": (vector_nodes._Total, nodes, inputs((2, 2, 9))),
        "_Spread": (vector_nodes._Spread, nodes, inputs((2, 2, 1, 5))),
        "_LargestOfListed": (vector_nodes._LargestOfListed, nodes, inputs((2, 2, 9), (3, 2, 9))),
    }


STEPS = [cls.__name__ for cls in vector_steps.Fused.__subclasses__() if cls is not vector_nodes._Copies]
STEPS += [cls.__name__ for cls in vector_nodes._Copies.__subclasses__()]


def as_tuple(y) -> tuple:
    return y if isinstance(y, tuple) else (y,)


@pytest.mark.parametrize("name", STEPS)
def test_fused_steps_are_their_definitions(name, monkeypatch):
    """Values and gradients."""
    step, constants, leaves = fused_steps(monkeypatch)[name]
    found = []
    for f in (step.apply, step.definition):
        y = as_tuple(f(*constants, *leaves))
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in y]
        loss = sum((x * w).sum() for x, w in zip(y, weights, strict=True))
        found.append([*y, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, {torch.float64: 1e-11})


@pytest.mark.parametrize("name", STEPS)
def test_second_derivatives_of_fused_steps(name, monkeypatch):
    step, constants, leaves = fused_steps(monkeypatch)[name]
    f = lambda *some: step.of(*constants, *some)  # noqa: E731
    assert torch.autograd.gradgradcheck(f, leaves)
    if isinstance(step, type) and issubclass(step, vector_nodes._Copies):
        return  # linear: its gradient does not depend on the input
    if len(leaves) > 1:
        assert torch.autograd.gradgradcheck(lambda x: f(x, *(y.detach() for y in leaves[1:])), leaves[:1])
    y = as_tuple(f(*leaves))[0].sin().sum()
    one = torch.autograd.grad(y, leaves, create_graph=True)
    two = torch.autograd.grad(sum(d.sin().sum() for d in one), leaves, create_graph=True)
    assert all(d.requires_grad for d in two)  # and so on


def test_a_second_derivative_where_inputs_depend_on_each_other():
    """Scale and shift are those of x, and every input's gradient is only its own."""
    conv, x = vector_layers.EdgeConvolution(2, 3, 2).double(), torch.randn(2, 3, 4, 3, dtype=torch.float64)
    found = []
    for f in (conv, lambda x: convolution(conv, x.permute(3, 2, 0, 1), 2).permute(2, 3, 1, 0)):
        leaf = x.clone().requires_grad_()
        (d_x,) = torch.autograd.grad(f(leaf).sin().sum(), leaf, create_graph=True)
        found.append([d_x, *torch.autograd.grad(d_x.square().sum(), [leaf, conv.feature, conv.direction])])
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs, {torch.float64: 1e-9})


def test_second_derivatives_under_autocast_change_nothing():
    conv, x = vector_layers.EdgeConvolution(3, 4, 2), torch.randn(3, 3, 5, 7, requires_grad=True)
    loss, found = conv(x).square().sum(), []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(loss, [x, *conv.parameters()], create_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_a_batch_of_gradients_of_fused_steps(name, monkeypatch):
    """vmap over the backward pass: torch.func's, and that of autograd.grad."""
    step, constants, leaves = fused_steps(monkeypatch)[name]
    y = as_tuple(step.of(*constants, *leaves))[0]
    weights = torch.randn(3, *y.shape, dtype=y.dtype)
    expected = [torch.autograd.grad(y, leaves, w, retain_graph=True) for w in weights]
    for found in (
        torch.autograd.grad(y, leaves, weights, is_grads_batched=True, retain_graph=True),
        torch.vmap(lambda w: torch.autograd.grad(y, leaves, w, retain_graph=True))(weights),
    ):
        for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
            assert_near(ours, torch.stack(theirs), {torch.float64: 1e-11})


def test_a_batch_of_no_cloud():
    net, batch = VectorNeurons(width=4), clouds(0, dtype=torch.float32)
    outputs = net(batch, torch.zeros(net.noise_shape(batch, 3)))
    assert outputs["scores"].shape == (0, 3, 5) and outputs["matrices"].shape == (0, 3, 3, 3)
    sum(x.sum() for x in outputs.values()).backward()
    assert all(not p.grad.any() for p in net.parameters())


# --- symmetry ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reflect", [1.0, -1.0])
@pytest.mark.parametrize("d", [2, 3])
def test_equivariance(d, reflect, training):
    net = VectorNeurons(dim=d, dropout=0.3).double().train(training)
    batch = clouds(4, 5, d)
    noise = torch.randn(net.noise_shape(batch, 3), dtype=torch.float64)
    h = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    h = torch.cat([h[:1] * torch.det(h).sign() * reflect, h[1:]])
    moved = PointClouds(batch.positions @ h.mT + 3, batch.velocities @ h.mT, batch.edges)
    plain, turned = run(net, batch, noise), run(net, moved, h @ noise)
    assert_near(turned["scores"], plain["scores"], {torch.float64: 1e-10})
    assert_near(turned["matrices"], h @ plain["matrices"], {torch.float64: 1e-10})

    net.dropout = 0.0  # its masks belong to places
    order = torch.randperm(5)
    permuted = PointClouds(batch.positions[:, order], batch.velocities[:, order], batch.edges)
    plain, permuted = run(net, batch, noise), run(net, permuted, noise[:, :, order])
    assert_near(permuted["scores"], plain["scores"][..., order], {torch.float64: 1e-10})
    assert_near(permuted["matrices"], plain["matrices"], {torch.float64: 1e-10})


def test_nodes_as_far_as_the_last_neighbor_are_neighbors():
    """A cross: the four tips are equally near to the middle, and none is preferred."""
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    near = vector_layers.nearest(cross.mT[None, :, :, None], 2)[..., 0]
    assert near[0].all()
    assert torch.equal(near[1], torch.tensor([True, True, False, False, False]))


def test_gradient_of_the_batch():
    net = VectorNeurons(width=3, neighbors=2, dropout=0.0).double().eval()
    batch, noise = clouds(1, 3), torch.randn(1, 1, 3, 3, 2, dtype=torch.float64)

    def f(positions, velocities, noise):
        outputs = net(PointClouds(positions, velocities, batch.edges), noise)
        return outputs["scores"], outputs["matrices"]

    assert torch.autograd.gradcheck(
        f, fast_mode=True, inputs=[x.requires_grad_() for x in (batch.positions, batch.velocities, noise)]
    )


def test_float32_is_near_float64():
    net = VectorNeurons(dropout=0.0)
    batch = clouds(50, dtype=torch.float32)
    noise = torch.randn(net.noise_shape(batch, 2))
    found = net(batch, noise)
    expected = net.double()(batch.to(torch.float64), noise.double())
    for name, value in expected.items():
        error = (found[name].double() - value).abs()  # one choice of a pool may fall otherwise
        assert error.median() <= GRADIENT[torch.float32] * value.abs().max()


# --- errors ---


def test_bad_input():
    net, batch = VectorNeurons(width=4), clouds(2, dtype=torch.float32)
    with pytest.raises(ValueError, match=re.escape("noise must be (2, 'S', 5, 3, 2), got (2, 4, 5, 3, 1)")):
        net(batch, torch.zeros(2, 4, 5, 3, 1))
    with pytest.raises(ValueError, match=re.escape("positions must be (B, n, 3), got (2, 5, 2)")):
        net(clouds(2, d=2), torch.zeros(2, 4, 5, 2, 2))
    with pytest.raises(ValueError, match=r"channels must be 1 or 2 .* got 3"):
        VectorNeurons(channels=3)
    with pytest.raises(ValueError, match="scores or matrices must be True"):
        VectorNeurons(scores=False, matrices=False)
    for settings, message in (({"width": 0}, "width must be at least 2, got 0"),
                              ({"width": 1}, "width must be at least 2, got 1"),
                              ({"width": 0, "scores": False}, "width must be at least 1, got 0"),
                              ({"neighbors": 0}, "neighbors must be at least 1, got 0")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^VectorNeurons: {message}$"):
            VectorNeurons(**settings)
    with pytest.raises(ValueError, match="B S n > 1"):
        net(clouds(1, 1), torch.zeros(1, 1, 1, 3, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("where", ["positions", "velocities", "noise"])
def test_bad_values_do_not_reach_the_running_statistics(where, bad):
    net, batch = VectorNeurons(width=4), clouds(2, dtype=torch.float32)
    tensors = {"positions": batch.positions, "velocities": batch.velocities, "noise": torch.zeros(2, 3, 5, 3, 2)}
    tensors[where].view(-1)[7] = bad
    before = {name: value.clone() for name, value in net.named_buffers()}
    if bad == 1e30:  # finite, but its square is not
        net(batch, tensors["noise"])
    else:
        with pytest.raises(ValueError, match=f"^VectorNeurons: {where} must be finite, got NaN or infinity$"):
            net(batch, tensors["noise"])
        for name, value in net.named_buffers():
            assert torch.equal(value, before[name]), name
    assert all(value.isfinite().all() for value in net.buffers())


def test_velocities_that_are_not_read_may_be_anything():
    net, batch = VectorNeurons(channels=1, width=4), clouds(2, dtype=torch.float32)
    batch.velocities.fill_(float("nan"))
    assert net(batch, torch.zeros(2, 3, 5, 3, 1))["scores"].isfinite().all()
