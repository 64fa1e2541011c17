"""Charged particles: predict positions one time unit ahead, with a GNN made equivariant to rotations and reflections."""

import argparse

import torch
from torch.nn.functional import mse_loss

import probsym_fast as psf
from probsym_fast.data.nbody import initial_conditions, simulate


def make_data(count: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The fields of clouds of five particles, and where the particles are at the later frame."""
    charges, positions, velocities = initial_conditions(count)
    x, v = (torch.from_numpy(a).float() for a in simulate(charges, positions, velocities, frames=(30, 40)))
    charge = torch.from_numpy(charges).float()
    distance = torch.cdist(x[:, 0], x[:, 0]).square()
    edges = torch.stack([charge[:, :, None] * charge[:, None], distance], dim=-1)
    return (x[:, 0], v[:, 0], edges), x[:, 1]


def make_model() -> psf.Symmetrized:
    network = psf.distributions.VectorNeurons(scores=False)  # a GNN needs no permutations: matrices only
    return psf.Symmetrized(
        backbone=psf.models.MessagePassing(in_features=6, edge_features=2),
        embed=psf.models.NodeVectors(),
        readout=psf.models.NodeReadout(displacement=True),
        distribution=psf.distributions.Learned(psf.groups.Euclidean(3), network),
    )


def main(options: argparse.Namespace) -> float:
    torch.manual_seed(options.seed)
    fields, target = make_data(2 * options.count)
    train = [field[: options.count] for field in fields]
    test = psf.PointClouds(*(field[options.count :] for field in fields))
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(options.count).split(50):
            prediction, _ = model(psf.PointClouds(*(field[rows] for field in train)), samples=4)
            loss = mse_loss(prediction, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        error = mse_loss(model(test, samples=20, seed=0)[0], target[options.count :]).item()
    straight = mse_loss((fields[0] + fields[1])[options.count :], target[options.count :]).item()
    print(f"test error {error:.4f} after {options.epochs} epochs; of straight lines {straight:.4f}")
    print(f"equivariance error with 20 samples: {psf.equivariance_error(model, test, samples=20):.4f}")
    return error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("count", 500), ("epochs", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
