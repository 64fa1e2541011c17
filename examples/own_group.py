"""A group of one's own: D4, the eight symmetries of a square, on point clouds in the plane."""

import argparse

import torch

import probsym_fast as psf

TURN, FLIP = torch.tensor([[0.0, -1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
MATRICES = torch.stack([torch.linalg.matrix_power(TURN, k % 4) @ (FLIP if k > 3 else torch.eye(2)) for k in range(8)])


class D4(psf.groups.Group):
    """Elements are numbers k = 0..7, (B, S) int64: turn by 90 degrees k % 4 times, after a flip where k > 3."""

    moves = "vp"  # the axes of vectors and points

    def identity(self, batch, samples):
        return torch.zeros(batch.size, samples, dtype=torch.int64, device=batch.device)

    def uniform(self, batch, samples, draws=None):
        return (8 * (draws or psf.Draws()).uniform((batch.size, samples), "d4", device=batch.device)).long()

    def compose(self, g, h):  # a flip reverses the turns after which it comes
        return (g + torch.where(g > 3, -h, h)) % 4 + 4 * ((g > 3) ^ (h > 3))

    def inverse(self, g):
        return torch.where(g > 3, g, -g % 4)

    def act(self, g, x, layout, *, inverse=False, mean=False):
        x = (x if x.ndim == len(layout) + 2 else x[:, None]).expand(-1, g.shape[1], *x.shape[x.ndim - len(layout) :])
        matrices = MATRICES.to(x)[self.inverse(g) if inverse else g]  # (B, S, 2, 2)
        for axis, letter in enumerate(layout, start=2):
            if letter in self.moves:
                x = torch.einsum("bsij,bs...j->bs...i", matrices, x.movedim(axis, -1)).movedim(-1, axis)
        return x.mean(1) if mean else x


def main(options: argparse.Namespace) -> dict[int, float]:
    torch.manual_seed(options.seed)
    backbone = psf.models.MessagePassing(in_features=4, edge_features=1, out_features=2)
    parts = backbone, psf.models.NodeVectors(), psf.models.NodeReadout(displacement=True)
    model = psf.Symmetrized(*parts, psf.distributions.Uniform(D4())).eval()
    positions, velocities = torch.randn(2, options.clouds, 5, 2)
    clouds = psf.PointClouds(positions, velocities, torch.ones(options.clouds, 5, 5, 1))
    errors = {S: psf.equivariance_error(model, clouds, samples=S, moves=4) for S in (1, 16, 256)}
    whole = torch.arange(8).expand(options.clouds, 8)  # every element once: no noise is left
    errors[8] = psf.equivariance_error(lambda x: model.apply_elements(x, whole), clouds, group=D4(), output="np")
    print("equivariance error with 1, 16, 256 random elements:", *(f"{errors[S]:.4f}" for S in (1, 16, 256)))
    print(f"with all 8 elements: {errors[8]:.4f}")
    return errors


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("clouds", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    main(parser.parse_args())
