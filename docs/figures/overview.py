"""overview.svg: what probabilistic symmetrization does, in one picture. Run from this folder: python overview.py"""

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyBboxPatch
from style import BLUE, COLORS, GREY, ORANGE, arrow, matrix, save

NODES, SAMPLES = 8, 3
ROWS = (0.77, 0.47, 0.17)  # of the samples, from the top


def graph() -> torch.Tensor:
    """A ring of 8 nodes with two chords, as a matrix of node numbers 1..8 where there is an edge."""
    adjacency = torch.zeros(NODES, NODES)
    for u, v in [(u, (u + 1) % NODES) for u in range(NODES)] + [(0, 3), (1, 6)]:
        adjacency[u, v] = adjacency[v, u] = 1
    return adjacency


def bars(axes, order, values) -> None:
    """A value a node, in the node's colour."""
    axes.barh(range(NODES), values, color=[COLORS[u] for u in order], height=0.8)
    axes.invert_yaxis()
    axes.axis("off")


def box(figure, x, y, width, height, text, color) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.005,rounding_size=0.015", fc=color, ec="none")
    figure.add_artist(shape)
    figure.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white")


def main() -> None:
    adjacency = graph()
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(NODES, generator=generator) for _ in range(SAMPLES)]
    outputs = torch.rand(SAMPLES, NODES, generator=generator) + torch.linspace(0.3, 1.2, NODES)
    figure = plt.figure(figsize=(10, 4.2))
    matrix(figure.add_axes((0.01, 0.36, 0.12, 0.28)), adjacency, "input $x$")
    box(figure, 0.17, 0.42, 0.11, 0.15, "distribution\n$p(g\\,|\\,x)$", ORANGE)
    arrow(figure, (0.135, 0.5), (0.167, 0.5))
    for k, (order, row) in enumerate(zip(orders, ROWS, strict=True)):
        arrow(figure, (0.287, 0.5), (0.335, row), ORANGE)
        permuted = adjacency[order][:, order]
        matrix(figure.add_axes((0.345, row - 0.12, 0.10, 0.24)), permuted, f"$g_{k + 1}^{{-1}}\\cdot x$")
        arrow(figure, (0.45, row), (0.488, row))
        box(figure, 0.495, row - 0.06, 0.11, 0.12, "backbone", BLUE)
        arrow(figure, (0.612, row), (0.648, row))
        bars(figure.add_axes((0.655, row - 0.11, 0.08, 0.22)), order.tolist(), outputs[k][order])
        arrow(figure, (0.737, row), (0.767, row))
        bars(figure.add_axes((0.775, row - 0.11, 0.08, 0.22)), range(NODES), outputs[k])
        arrow(figure, (0.857, row), (0.888, 0.5 + 0.25 * (row - 0.47)))
    figure.text(0.695, 0.93, "outputs", ha="center", color=GREY)
    figure.text(0.815, 0.93, "$g_s\\cdot$ outputs", ha="center", color=GREY)
    figure.text(0.55, 0.93, "any network", ha="center", color=GREY)
    mean = figure.add_axes((0.9, 0.36, 0.09, 0.28))
    bars(mean, range(NODES), outputs.mean(0))
    mean.set_title("mean: $f(x)$")
    save(figure, "overview")


if __name__ == "__main__":
    main()
