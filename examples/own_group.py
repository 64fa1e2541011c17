"""A group of one's own: D4, the eight symmetries of a square, on point clouds in the plane."""

import argparse

import torch

import probsym_fast as psf

TURN, FLIP = [[0.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, -1.0]]
D4 = psf.groups.Finite.generated({"vp": torch.tensor([TURN, FLIP])})  # they act on vectors and points; all products


def main(options: argparse.Namespace) -> dict[int, float]:
    torch.manual_seed(options.seed)
    backbone = psf.models.MessagePassing(in_features=4, edge_features=1, out_features=2)
    parts = backbone, psf.models.NodeVectors(), psf.models.NodeReadout(displacement=True)
    model = psf.Symmetrized(*parts, psf.distributions.Uniform(D4)).eval()
    positions, velocities = torch.randn(2, options.clouds, 5, 2)
    clouds = psf.PointClouds(positions, velocities, torch.ones(options.clouds, 5, 5, 1))
    errors = {S: psf.equivariance_error(model, clouds, samples=S, moves=4) for S in (1, 16, 256)}
    print("equivariance error with 1, 16, 256 random elements:", *(f"{errors[S]:.4f}" for S in (1, 16, 256)))
    model.distribution = psf.distributions.Orbit(D4)  # every element once: no noise is left
    errors[8] = psf.equivariance_error(model, clouds, samples=D4.order, moves=4)
    print(f"with all {D4.order} elements: {errors[8]:.4f}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("clouds", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
