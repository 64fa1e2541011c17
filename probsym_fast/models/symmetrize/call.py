"""A symmetrized model in one call: the parts around a network, chosen for its data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probsym_fast._autocast import promoted
from probsym_fast._checks import check_count, check_type
from probsym_fast._inputs import embedded
from probsym_fast.batches import Graphs, Images, PointClouds, check_batch
from probsym_fast.distributions import Discrete, Distribution
from probsym_fast.draws import Draws
from probsym_fast.groups import Group
from probsym_fast.models.point_clouds import POOLS
from probsym_fast.models.symmetrize.choices import distribution_of
from probsym_fast.models.symmetrize.clouds import CloudParts
from probsym_fast.models.symmetrize.graphs import GraphParts
from probsym_fast.models.symmetrize.images import ImageParts, check_moves_images, example_for
from probsym_fast.models.symmetrize.networks import like, run
from probsym_fast.models.symmetrized import Symmetrized

TOKENS = {
    PointClouds: ("flat", "nodes", "pairs"),
    Graphs: ("flat", "patches", "sequence", "identifiers"),
    Images: ("patches", "pixels"),
}
OUTPUTS = {
    PointClouds: ("invariant", "nodes", "vectors", "positions"),
    Graphs: ("invariant", "nodes", "pairs"),
    Images: ("invariant", "tokens", "masks"),
}


def symmetrize(
    net: nn.Module,
    group: Group,
    example: Graphs | PointClouds | Images | None = None,
    *,
    tokens: str | None = None,
    output: str = "invariant",
    out_features: int | None = None,
    distribution: str | Distribution | None = None,
    width: int | None = None,
    pool: str = "sum",
    embed: nn.Module | None = None,
    readout: nn.Module | None = None,
    **settings: Any,
) -> Symmetrized:
    """A `Symmetrized` model around a network, with the parts that its data and its output ask for.

    `print(model)` shows the parts. Each is an attribute (`model.embed`, `backbone`, `readout`, `distribution`) and can be
    replaced, here or later. A network that takes one batch axis is `Folded`; an `nn.TransformerEncoder` gets linear maps from
    the nodes' values to its width and to out_features, and runs as one op where it fits (`fuse`). The network's parameters
    are the model's: training one trains the other. New ones have the device and the dtype of the example (those of learned
    elements at least float32).

        classifier = timm.create_model("vit_small_patch16_224", pretrained=True)
        model = psf.symmetrize(classifier, psf.groups.Dihedral(4)).eval()
        logits, _ = model(psf.Images(pixels))  # of the whole orbit, without training

    Args:
        net: the network. group: the symmetry. example: a batch as the model will get. Its sizes (features, dimensions, nodes)
            fix those of the parts. One forward pass of two samples on it checks that everything fits. An image model of timm
            needs none: its own image size is taken.
        tokens: what the network takes, B inputs and S samples.
            `PointClouds`: "nodes" (B, S, n, d (+ d) (+ F)), positions, velocities and features; "flat" (B, S, n ...), these
            in one vector; "pairs" (B, S, n n, ...), a token per pair.
            `Graphs`: "flat" (B, S, width), the first linear map of an MLP on adjacency and features; "patches", tokens of a
            `timm_backbone`; "sequence", node features as tokens of an `hf_backbone`; "identifiers" (nodes, S, width) and the
            graphs, for a GNN.
            `Images`: "patches", for a model of timm whose patch embedding is one convolution, with its own weights
            (`ImageTokens.of`), or for a `timm_backbone`; "pixels" (B S, C, H, W), moved images, for any other network.
            None: by the network.
        output: "invariant", one vector per input; "nodes", invariant values of nodes; of clouds also "vectors", equivariant
            ones of nodes, and "positions", vectors added to the nodes' positions; of graphs also "pairs"; of images also
            "tokens" (B, D, rows, columns), and "masks" (B, classes, H, W) of dense networks or tokens.
        out_features: outputs of a last linear map that the readout or the encoder makes. None: the network's outputs are
            the prediction; of a timm model those of its own classifier.
        distribution: "learned" (probabilistic symmetrization), "canonical" (learned, without noise: one sample), "uniform"
            (group averaging), "orbit" (every element of a finite group), "frame" (principal axes, or an order), "none", or a
            `Distribution`. Learned means `VectorNeurons` for clouds, whose noise has the spread of the example's points, and
            `GIN` for graphs. For finite groups and for images it means an `Energy` (`RotationEnergy` of SO(2) and O(2)) with
            reduce="weighted", so that a loss trains it; of a finite group it takes at most group.order samples. A canonical
            one of these learns by its penalty "prior", for inputs that mostly come upright. A `Distribution` of your own
            keeps reduce="mean". None: "learned" for clouds and graphs. For images, whose networks often are trained already,
            what needs no training: "orbit" of a finite group, else "uniform".
        width: of "flat" and "identifiers", what the network takes. None: read from the network.
        pool: how a network's outputs of nodes become one vector per cloud or graph, "sum" or "mean".
        embed, readout: in place of the chosen ones.
        settings: of `Symmetrized`: draws, reduce, score, chunk, memory.

    Raises TypeError for arguments of another type. ValueError for unknown names, for data or groups without a choice (give
    the part then), and where the network's outputs do not fit.
    """
    owner = "symmetrize"
    check_type(owner, "net", net, nn.Module, "an nn.Module")
    check_type(owner, "group", group, Group, "a Group")
    example = example_for(net) if example is None else example
    check_batch(owner, example, name="example")
    example.check()
    out_features = None if out_features is None else check_count(owner, "out_features", out_features)
    kind = next((kind for kind in TOKENS if isinstance(example, kind)), None)
    missing = [n for n, part in (("embed", embed), ("readout", readout)) if part is None]
    if kind is None and missing:
        got = type(example).__name__
        raise ValueError(
            f"{owner}: {missing[0]} must be given for batches other than Graphs, PointClouds and Images, got {got}"
        )
    if pool not in POOLS:
        raise ValueError(f"{owner}: pool must be one of {POOLS}, got {pool!r}")
    for name, value, known in (("tokens", tokens, TOKENS), ("output", output, OUTPUTS)):
        if kind is not None and value is not None and value not in known[kind]:
            raise ValueError(f"{owner}: {name} must be one of {known[kind]} for {kind.__name__}, got {value!r}")
    parts: CloudParts | GraphParts | ImageParts | None = None
    if isinstance(example, PointClouds):
        parts = CloudParts(net, group, example, tokens, output, out_features)
    elif isinstance(example, Graphs):
        parts = GraphParts(net, group, example, tokens, output, out_features, width, pool)
    elif isinstance(example, Images):
        if embed is None:
            check_moves_images(group)
        parts = ImageParts(net, example, tokens, output, out_features)
    if not isinstance(distribution, Distribution):
        distribution = distribution_of(distribution, group, example)
        # scores take what the network takes; what gives elements has at least float32
        scores = isinstance(distribution, Discrete)
        distribution.to(example.dtype if scores else promoted(example.dtype, torch.float32))
        if isinstance(distribution, Discrete) and not distribution.best and settings.get("reduce") is None:
            settings["reduce"] = "weighted"
    if embed is None and parts is not None:
        embed = like(parts.embed(), net, example)
    backbone = net if parts is None else parts.backbone()
    assert embed is not None
    distribution.to(example.device)
    embed.to(example.device)
    if readout is None:
        assert parts is not None and kind is not None
        others = [name for name in TOKENS[kind] if name != parts.tokens]
        chose = f"; symmetrize chose tokens={parts.tokens!r}, others are {', '.join(map(repr, others))}"
        chosen = tokens is None and missing[0] == "embed"
        outputs = _tried(backbone, embed, distribution, example, chose if chosen else "")
        readout = like(parts.readout(outputs, pool), net, example)
    return Symmetrized(backbone, embed, readout, distribution, **settings)


def _tried(backbone: nn.Module, embed: nn.Module, distribution: Distribution, example: Any, chose: str) -> Tensor:
    """The backbone's outputs of two samples. chose: for errors, a choice that may be the reason."""

    def outputs() -> Any:
        g, _ = distribution(example, 2, Draws(seed=0))
        arguments, named = embedded(embed, example, distribution.group, g)
        try:
            return backbone(*arguments, **named)
        except (RuntimeError, TypeError, ValueError) as error:
            given = [tuple(x.shape) for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
            raise ValueError(f"symmetrize: net must take inputs of shapes {given}, got {error}{chose}") from error

    found = run(outputs, backbone, embed, distribution)
    if not isinstance(found, Tensor):
        raise ValueError(f"symmetrize: net must return a Tensor, or readout be given, got {type(found).__name__}")
    return found
