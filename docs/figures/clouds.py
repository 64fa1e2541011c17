"""clouds.svg: a point cloud, seen from sampled frames, and the predictions turned back."""

import matplotlib.pyplot as plt
import torch
from style import BLUE, COLORS, GREY, ORANGE, arrow, save

import probsym_fast as psf

POINTS, SAMPLES = 5, 3


def draw(figure, place, points, arrows=None, frame=None, title="") -> None:
    """Points in their colours, with an arrow each, or the axes of a frame."""
    axes = figure.add_axes(place)
    axes.scatter(*points.T, c=COLORS[: len(points)], s=36, zorder=3)
    if arrows is not None:
        axes.quiver(*points.T, *arrows.T, color=GREY, angles="xy", scale_units="xy", scale=1, width=0.012)
    if frame is not None:
        center = points.mean(0).expand(2, 2)
        axes.quiver(*center.T, *frame, color=[BLUE, ORANGE], angles="xy", scale_units="xy", scale=1, width=0.016)
    axes.set(xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[], aspect="equal", title=title)
    for side in axes.spines.values():
        side.set(visible=True, color=GREY, linewidth=0.8)


def main() -> None:
    torch.manual_seed(4)
    x = torch.randn(POINTS, 2)
    x = 1.3 * (x - x.mean(0)) / x.std()
    frames = psf.ops.orthogonal_frame(torch.randn(SAMPLES, 2, 2))
    seen = psf.ops.act_orthogonal(x[None, :, :, None], frames[None], inverse=True)[0, ..., 0]  # (samples, points, 2)
    moves = 0.5 * seen.roll(1, 1) + torch.tensor([0.5, 0.0])  # a network that is not equivariant
    back = psf.ops.act_orthogonal(moves[None, ..., None], frames[None])[0, ..., 0]

    figure = plt.figure(figsize=(11, 5.6))
    draw(figure, (0.01, 0.34, 0.17, 0.33), x, title="cloud $x$")
    for k, bottom in enumerate((0.68, 0.36, 0.04)):
        titles = (
            ("sampled frame $g$", "$g^{-1} \\cdot x$", "prediction of the network", "$g$ · prediction")
            if k == 0
            else ("",) * 4
        )
        draw(figure, (0.24, bottom, 0.14, 0.27), x, frame=frames[k], title=titles[0])
        draw(figure, (0.43, bottom, 0.14, 0.27), seen[k], title=titles[1])
        draw(figure, (0.62, bottom, 0.14, 0.27), seen[k], moves[k], title=titles[2])
        draw(figure, (0.81, bottom, 0.14, 0.27), x, back[k], title=titles[3])
        for left in (0.385, 0.575, 0.765):
            arrow(figure, (left, bottom + 0.135), (left + 0.04, bottom + 0.135))
        arrow(figure, (0.19, 0.5), (0.235, bottom + 0.135))
    figure.text(0.965, 0.5, "mean", rotation=90, va="center", color=GREY)
    save(figure, "clouds")


if __name__ == "__main__":
    main()
