"""soft_permutation.svg: scores, the permutation that sorts them, and its relaxation at several temperatures."""

import matplotlib.pyplot as plt
import torch
from style import BLUE, ORANGE, matrix, save

import probsym_fast as psf

NODES = 12
TAUS = (0.01, 0.1, 0.5)


def main() -> None:
    scores = torch.randn(1, 1, NODES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    figure, axes = plt.subplots(1, 6, figsize=(12, 2.5), layout="constrained")
    axes[0].bar(range(NODES), scores.flatten(), color=BLUE)
    axes[0].set(title="scores", xlabel="node", yticks=[])
    hard = psf.ops.soft_permutation(scores, tau=TAUS[0])
    matrix(axes[1], hard.hard()[0, 0], "permutation\n(the value)", vmin=0, vmax=1)
    for panel, tau in zip(axes[2:5], TAUS, strict=True):
        soft = psf.ops.soft_permutation(scores, tau=tau)
        matrix(panel, soft.soft()[0, 0].detach(), f"relaxation, $\\tau$ = {tau}\n(the gradient)", vmin=0, vmax=1)
    for panel in axes[1:5]:
        panel.set(xlabel="slot", ylabel="node")
    taus = torch.logspace(-2.5, 0.5, 40).tolist()
    entropies = [psf.ops.permutation_entropy(psf.ops.soft_permutation(scores, tau=tau)).item() for tau in taus]
    axes[5].semilogx(taus, entropies, color=ORANGE)
    axes[5].set(title="entropy penalty", xlabel="$\\tau$")
    save(figure, "soft_permutation")


if __name__ == "__main__":
    main()
