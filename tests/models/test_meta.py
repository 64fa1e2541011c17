"""Modules built on the meta device, given memory and loaded: their state dict says everything that they need."""

import importlib.util
import inspect

import pytest
import torch
from torch import nn

from probsym_fast import Images, Symmetrized, distributions, models
from probsym_fast.distributions import GIN, Learned, Uniform, VectorNeurons
from probsym_fast.groups import Cyclic, Dihedral, Euclidean, SpecialOrthogonal, Symmetric
from tests.helpers.graphs import random_graphs
from tests.models.test_symmetrized import clouds

N, WIDTH, GRID = 6, 8, 2
GRAPHS = random_graphs([5, 6, 3], dtype=torch.float32, edge_features=3)
GRAPHS = GRAPHS.replace(pairs=GRAPHS.edge_index[:, ::2])
CLOUDS = clouds(dtype=torch.float32)
IMAGES = Images(torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)))
G = Symmetric(N).identity(GRAPHS, 2)
MOTIONS = Euclidean(3).identity(CLOUDS, 2)


class FirstOfEach(nn.Module):
    """The first feature of every node, moved: (B, S, N)."""

    def forward(self, batch, group, g):
        return group.act(g, batch.padded(batch.x[:, :1], N)[:, 0], "w", inverse=True)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def on_graphs(part: nn.Module):
    return part(GRAPHS, Symmetric(N), G)


def back_to_graphs(*shape: int):
    return lambda part: part(tokens(3, 2, *shape), GRAPHS, Symmetric(N), G)


def back_to_clouds(part: nn.Module):
    return part(tokens(3, 2, 5, 3), CLOUDS, Euclidean(3), MOTIONS)


def encoder() -> models.OnePass:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 4, dropout=0.0, batch_first=True, norm_first=True)
    return models.fuse(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))


class OnEdges(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(WIDTH, 2)

    def forward(self, x, edge_index):
        return self.map(x.index_add(0, edge_index[1], x[edge_index[0]]))


# every public module: how it is built, and what runs it
MODULES = {
    "GIN": (lambda: GIN(2, WIDTH), lambda net: net(GRAPHS, tokens(14, 2, 2))),
    "VectorNeurons": (lambda: VectorNeurons(width=4), lambda net: net(CLOUDS, tokens(3, 2, 5, 3, 2))),
    "MLP": (lambda: models.MLP([WIDTH, 4]), lambda net: net(tokens(2, WIDTH))),
    "FlatGraph": (lambda: models.FlatGraph(N, WIDTH, 2, 3), on_graphs),
    "IdentifiedNodes": (lambda: models.IdentifiedNodes(N, WIDTH, 2), lambda part: on_graphs(part)[0]),
    "PatchWeight": (lambda: models.PatchWeight(WIDTH, 2, 3), lambda part: part()),
    "GINBackbone": (lambda: models.GINBackbone(WIDTH, 2, 2, "tanh"), lambda net: net(tokens(14, 2, WIDTH), GRAPHS)),
    "PyGBackbone": (
        lambda: models.PyGBackbone(OnEdges(), pool="sum"),
        lambda net: net(tokens(14, 2, WIDTH), GRAPHS),
    ),
    "GraphTokens": (lambda: models.GraphTokens(N, WIDTH, GRID, 2, 3), on_graphs),
    "NodeTokens": (lambda: models.NodeTokens(N, WIDTH, GRID, 2), on_graphs),
    "MeanReadout": (models.MeanReadout, back_to_graphs(WIDTH)),
    "GraphReadout": (lambda: models.GraphReadout(WIDTH, 2), back_to_graphs(WIDTH)),
    "SlotReadout": (lambda: models.SlotReadout(N, WIDTH), back_to_graphs(WIDTH)),
    "ScoredReadout": (
        lambda: models.ScoredReadout(models.MeanReadout(), nn.Linear(WIDTH, 1)),
        back_to_graphs(WIDTH),
    ),
    "DiagonalReadout": (lambda: models.DiagonalReadout(N, WIDTH, GRID, 2), back_to_graphs(GRID, WIDTH)),
    "PairReadout": (lambda: models.PairReadout(N, WIDTH, GRID), back_to_graphs(GRID**2, WIDTH)),
    "NodeVectors": (models.NodeVectors, lambda part: part(CLOUDS, Euclidean(3), MOTIONS)),
    "PairTokens": (models.PairTokens, lambda part: part(CLOUDS, Euclidean(3), MOTIONS)),
    "FlatCloud": (models.FlatCloud, lambda part: part(CLOUDS, Euclidean(3), MOTIONS)),
    "NodeReadout": (
        lambda: models.NodeReadout(True),
        back_to_clouds,
    ),
    "LayoutReadout": (lambda: models.LayoutReadout("nv"), back_to_clouds),
    "PooledReadout": (models.PooledReadout, back_to_clouds),
    "MessagePassing": (
        lambda: models.MessagePassing(layers=1),
        lambda net: net(tokens(3, 2, 5, 6), tokens(3, 1, 5, 5, 2)),
    ),
    "Transformer": (
        lambda: models.Transformer(layers=1, read=[0, 6, 12, 18, 24, 1]),
        lambda net: net(tokens(2, 25, 8)),
    ),
    "ImageScores": (lambda: models.ImageScores(1, 4, 2), lambda net: net(IMAGES.pixels)),
    "FusedMLP": (
        lambda: models.fuse(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 2))),
        lambda net: net(tokens(2, 5, WIDTH)),
    ),
    "Folded": (lambda: models.Folded(nn.Linear(WIDTH, 2)), lambda net: net(tokens(2, 5, WIDTH))),
    "FusedEncoder": (
        encoder,
        lambda net: net(tokens(2, 5, WIDTH)),
    ),
    "Uniform": (lambda: Uniform(Symmetric(N)), lambda p: p(GRAPHS, 2, seeded())[0].order),
    "Identity": (lambda: distributions.Identity(Symmetric(N)), lambda p: p(GRAPHS, 2)[0].order),
    "Frame": (lambda: distributions.Frame(Symmetric(N)), lambda p: p(GRAPHS, 2, seeded())[0].order),
    "MinimalFrame": (lambda: distributions.MinimalFrame(Euclidean(3)), lambda p: p(CLOUDS, 2, seeded())[0].frame),
    "WeightedFrame": (lambda: distributions.WeightedFrame(Euclidean(3)), lambda p: p(CLOUDS, 2, seeded())[0].frame),
    "Orbit": (lambda: distributions.Orbit(Dihedral(3)), lambda p: p(GRAPHS, 4, seeded())[0]),
    "Energy": (
        lambda: distributions.Energy(Cyclic(N, "w"), nn.Linear(N, 1), FirstOfEach(), prior=torch.eye(N)[0]),
        lambda p: p.elements_and_weights(GRAPHS, N)[1],
    ),
    "RotationEnergy": (
        lambda: distributions.RotationEnergy(
            SpecialOrthogonal(2), models.ImageScores(1, 4, 2), models.MovedImages(), n=4, prior=1.0
        ),
        lambda p: p.elements_and_weights(IMAGES, 2, seeded())[1],
    ),
    "Learned": (lambda: Learned(Symmetric(N), GIN(2, WIDTH), tau=0.1), lambda p: p(GRAPHS, 2, seeded())[0].log_r),
    "Symmetrized": (
        lambda: Symmetrized(
            models.Transformer(layers=1, read=range(0, 25, 6)),
            models.PairTokens(),
            models.NodeReadout(True),
            Learned(Symmetric(5) * Euclidean(3), VectorNeurons(width=4), tau=0.1),
        ),
        lambda f: f(CLOUDS, 2, torch.Generator().manual_seed(1))[0],
    ),
}
TIMM = {"read": "tokens", "grid": GRID}
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4}
VISION = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "DeiT": ("deit_tiny_distilled_patch16_224", {"read": "pooled"}),
    "BEiT": ("beit_base_patch16_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "rotary by block": ("vit_base_patch16_rope_mixed_224", {}),
    "relative": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias"}),
    "relative, an MLP": ("vit_relpos_small_patch16_224", {}),
    "ConViT": ("convit_tiny", {"embed_dim": 12}),
    "XCiT": ("xcit_nano_12_p16_224", {}),
    "BEiT, diagonal": ("beit_base_patch16_224", {"read": "diagonal"}),
    "BEiT, shared positions": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
}


def vision(name: str) -> tuple:
    architecture, settings = VISION[name]
    make = lambda: models.timm_backbone(architecture, **TIMM | SMALL | settings)  # noqa: E731
    return make, lambda net: net(tokens(2, GRID**2, net.width))


def language(kind: str) -> tuple:
    import transformers

    sizes = {"vocab_size": 9, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=16)
    make = lambda: models.hf_backbone(config, False, tokens=5, read="tokens")  # noqa: E731
    return make, lambda net: net(tokens(2, 5, 16))


def seeded():
    from probsym_fast.groups import Draws

    return Draws(seed=1)


def test_every_public_module_is_here():
    abstract = {"Discrete", "Distribution", "OnePass"}
    kinds = [x for x in (*vars(models).values(), *vars(distributions).values()) if inspect.isclass(x)]
    public = {x.__name__ for x in kinds if issubclass(x, nn.Module)} - abstract
    assert public == {*MODULES, "VisionBackbone", "WholeVisionBackbone", "LanguageBackbone"}


def outputs(found) -> list[torch.Tensor]:
    found = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else [found]
    return [x for x in found if isinstance(x, torch.Tensor)]


def check(make, run) -> None:
    torch.manual_seed(0)
    built = make().eval()
    with torch.device("meta"):
        empty = make().eval()
    assert all(x.device.type == "meta" for x in empty.state_dict().values())
    torch.use_deterministic_algorithms(True)  # fills empty memory: NaN, and the largest integers
    try:
        loaded = empty.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    loaded.load_state_dict(built.state_dict(), strict=True)
    compare(built, loaded, run)


def check_assigned(make, run) -> None:
    """As `check`, with the weights assigned in place of empty memory."""
    built = make().eval()
    with torch.device("meta"):
        loaded = make().eval()
    loaded.load_state_dict(built.state_dict(), strict=True, assign=True)
    compare(built, loaded, run)


def compare(built, loaded, run) -> None:
    with torch.no_grad():
        expected, found = outputs(run(built)), outputs(run(loaded))
    assert expected and all(x.isfinite().all() for x in expected)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", MODULES)
def test_built_on_meta(name):
    check(*MODULES[name])


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="no timm")
@pytest.mark.parametrize("name", VISION)
def test_vision_built_on_meta(name):
    check(*vision(name))
    check_assigned(*vision(name))


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="no transformers")
@pytest.mark.parametrize("kind", ["Roberta", "Llama"])
def test_language_built_on_meta(kind):
    check(*language(kind))
    check_assigned(*language(kind))
