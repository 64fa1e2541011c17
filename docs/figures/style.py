"""What the figures share: colours, matrices, and how a figure is saved. The SVG is the same on every run."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREY = "#3f51b5", "#e8710a", "#667085"
COLORS = ("#3f51b5", "#e8710a", "#188038", "#a142f4", "#d93025", "#12a4af", "#b08800", "#5f6368")  # of nodes
plt.rcParams.update({"svg.hashsalt": "probsym_fast", "font.size": 10, "axes.spines.top": False})
plt.rcParams.update({"axes.spines.right": False, "axes.titlesize": 10, "font.family": "DejaVu Sans"})


def matrix(axes, values, title="", cmap="Blues", **settings) -> None:
    """A matrix as squares, without ticks."""
    axes.imshow(values, cmap=cmap, **settings)
    axes.set_title(title)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(visible=True, color=GREY, linewidth=0.8)


def arrow(figure, start, end, color=GREY) -> None:
    """An arrow in the figure's coordinates, 0 to 1."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.3}
    figure.add_artist(matplotlib.patches.FancyArrowPatch(start, end, mutation_scale=12, **style))


def save(figure, name: str) -> None:
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)
