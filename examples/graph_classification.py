"""Graph classification with PyTorch Geometric: an MLP on adjacency matrices, made invariant to the order of the nodes."""

import argparse
import random

import torch
from torch.nn.functional import cross_entropy
from torch_geometric.datasets import FakeDataset
from torch_geometric.loader import DataLoader

import probsym_fast as psf


def make_model(N: int, features: int, classes: int) -> psf.Symmetrized:
    network = psf.distributions.GIN(features)
    return psf.Symmetrized(
        backbone=psf.models.MLP([128, 128, classes]),
        embed=psf.models.FlatGraph(N=N, width=128, node_features=features),
        readout=psf.models.MeanReadout(),
        distribution=psf.distributions.Learned(psf.groups.Symmetric(N), network, psf.distributions.UniformNoise()),
    )


@torch.no_grad()
def accuracy(model: psf.Symmetrized, graphs, samples: int) -> float:
    model.eval()
    batch = next(iter(DataLoader(graphs, batch_size=len(graphs))))
    prediction, _ = model(psf.Graphs.from_data(batch), samples=samples, seed=0)
    return (prediction.argmax(1) == batch.y).float().mean().item()


def main(options: argparse.Namespace) -> float:
    random.seed(options.seed)  # FakeDataset draws from it
    torch.manual_seed(options.seed)
    graphs = FakeDataset(options.graphs, avg_num_nodes=12, avg_degree=3, num_channels=8, num_classes=3, task="graph")
    held_out = options.graphs // 4
    test, train = graphs[:held_out], graphs[held_out:]
    model = make_model(max(graph.num_nodes for graph in graphs), 8, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        model.train()
        for batch in DataLoader(train, batch_size=32, shuffle=True):
            prediction, penalties = model(psf.Graphs.from_data(batch), samples=4)
            loss = cross_entropy(prediction, batch.y) + 0.1 * penalties["entropy"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = accuracy(model, test, samples=16)
    print(f"test accuracy {found:.0%} on {held_out} graphs, after {options.epochs} epochs")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("graphs", 200), ("epochs", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
