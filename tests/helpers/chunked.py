"""Small models whose samples run in chunks, one of them with dropout and batch statistics."""

import torch
from torch import nn

from probsym_fast import Symmetrized, models
from probsym_fast.distributions import GIN, Learned, UniformNoise
from probsym_fast.groups import Symmetric
from probsym_fast.groups.elements import tensors
from probsym_fast.models.chunks import Chunks
from tests.conftest import assert_near

S, N, C = 7, 9, 2
WIDTH = 64  # of the vision transformer
VIT = {"depth": 3, "embed_dim": WIDTH, "num_heads": 2}


def vit(read: str, readout, node_features: int = C, **settings):
    backbone = models.timm_backbone("vit_tiny_patch16_224", grid=3, read=read, **VIT, **settings)
    return backbone, models.GraphTokens(N, WIDTH, 3, node_features), readout


def graph_model(name: str, distribution=None) -> Symmetrized:
    if name == "flat MLP":
        parts = models.MLP([16, 8, 3]), models.FlatGraph(N, 16, C), models.MeanReadout()
    elif name == "slots":
        parts = models.MLP([16, 8]), models.FlatGraph(N, 16, C), models.SlotReadout(N, 8)
    elif name == "GIN":
        parts = models.GINBackbone(8, 2, 3, "relu"), models.IdentifiedNodes(N, 8, C), models.MeanReadout()
    elif name == "ViT nodes":
        parts = vit("diagonal", models.DiagonalReadout(N, WIDTH, 3, 4))
    else:
        parts = vit("pooled", models.GraphReadout(WIDTH, 4))
    learned = Learned(Symmetric(N), GIN(C, 8, dropout=0.1), UniformNoise(), tau=0.1)
    return Symmetrized(*parts, distribution or learned)


def outcome(
    f: Symmetrized, batch, samples=S, loss=lambda y: (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()
):
    """Prediction, gradients and the elements' tensors, in training."""
    f.train().zero_grad()
    drawn = []
    hook = f.distribution.register_forward_hook(lambda *x: drawn.append(list(tensors(x[-1][0]))))
    torch.manual_seed(3)
    y, penalties = f(batch, samples, torch.Generator().manual_seed(5))
    hook.remove()
    (loss(y) + sum(penalties.values())).backward()
    return y.detach(), {n: p.grad for n, p in f.named_parameters() if p.grad is not None}, drawn[0]


def assert_same(found, expected):
    assert_near(found[0], expected[0], {torch.float64: 1e-12})
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert_near(found[1][name], gradient, {torch.float64: 1e-10})
    for a, b in zip(found[2], expected[2], strict=True):
        assert torch.equal(a, b)


class Noisy(nn.Module):
    """A backbone with batch statistics and dropout in front of another; it may lack memory for so many rows."""

    def __init__(self, then: nn.Module, width: int, dropout: float = 0.3, most: int | None = None):
        super().__init__()
        self.norm, self.drop, self.then = nn.BatchNorm1d(width), nn.Dropout(dropout), then
        self.most, self.recomputed_alone, self.calls = most, False, []

    def forward(self, x):
        rows = x.shape[:-1].numel()
        again = torch._C._current_graph_task_id() >= 0  # within a backward pass
        self.calls.append((rows, again))
        x = self.drop(self.norm(x.flatten(0, 1)).view(x.shape))
        if self.most is not None and rows > self.most and (again or not self.recomputed_alone):
            raise torch.OutOfMemoryError(f"{rows} rows")
        return self.then(x)


def noisy(chunk=None, dropout=0.3, most=None, **settings) -> Symmetrized:
    torch.manual_seed(0)
    f = graph_model("flat MLP").double()
    f.backbone = Noisy(f.backbone, 16, dropout, most).double()
    f.chunks = Chunks(chunk, **settings)
    return f
