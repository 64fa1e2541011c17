"""A vision transformer of timm that labels the nodes of graphs: find a pattern planted in a stochastic block model."""

import argparse
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch_geometric.loader import DataLoader

import probsym_fast as psf
from probsym_fast.data import pattern

N, GRID = 188, 8  # nodes of the largest graph; patches along each axis of its adjacency matrix


def make_model(name: str, pretrained: bool) -> psf.Symmetrized:
    depth: dict[str, Any] = {} if pretrained else {"depth": 2}
    backbone = psf.models.timm_backbone(name, pretrained=pretrained, grid=GRID, read="diagonal", **depth)
    width, network = backbone.width, psf.distributions.GIN(3)
    return psf.Symmetrized(
        backbone=backbone,
        embed=psf.models.GraphTokens(N=N, width=width, grid=GRID, node_features=3, nodes="diagonal"),
        readout=psf.models.DiagonalReadout(N=N, width=width, grid=GRID, out_features=2),
        distribution=psf.distributions.Learned(psf.groups.Symmetric(N), network, psf.distributions.UniformNoise()),
    )


def main(options: argparse.Namespace) -> float:
    torch.manual_seed(options.seed)
    model = make_model(options.name, options.pretrained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    train = DataLoader(pattern("train", options.graphs), batch_size=8, shuffle=True)
    weight = torch.tensor([0.2, 0.8])  # few nodes are in the pattern
    for _ in range(options.epochs):
        for batch in train:
            prediction, penalties = model(psf.Graphs.from_data(batch), samples=1)
            loss = cross_entropy(prediction, batch.y, weight) + 0.1 * penalties["entropy"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    batch = next(iter(DataLoader(pattern("test", 32), batch_size=32)))
    with torch.no_grad():
        right = model(psf.Graphs.from_data(batch), samples=4, seed=0)[0].argmax(1) == batch.y
    accuracy = torch.stack([right[batch.y == label].float().mean() for label in (0, 1)]).mean().item()
    print(f"mean accuracy of the two classes {accuracy:.1%} after {options.epochs} epochs")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="vit_tiny_patch16_224", help="a ViT or BEiT of timm")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights (a download)")
    for name, value in (("graphs", 400), ("epochs", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
