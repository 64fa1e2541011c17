"""tokens.svg: a graph's matrix, permuted, cut into patches, and a token a patch."""

import matplotlib.pyplot as plt
import torch
from style import GREY, arrow, matrix, save

import probsym_fast as psf

NODES, GRID, WIDTH = 12, 4, 6


def main() -> None:
    torch.manual_seed(0)
    groups = torch.arange(NODES) // 4  # three parts, many edges within and few between
    likely = torch.where(groups[:, None] == groups, 0.75, 0.08)
    upper = torch.bernoulli(likely).triu(1)
    adjacency = upper + upper.T
    shuffle = torch.randperm(NODES)
    adjacency = adjacency[shuffle][:, shuffle]
    edge_index = adjacency.nonzero().T.contiguous()
    graph = psf.Graphs(torch.zeros(NODES, 1), edge_index, torch.tensor([0, NODES]))
    order = groups[shuffle].argsort(stable=True)[None, None]  # what a trained distribution may find
    embed = psf.models.GraphTokens(N=NODES, width=WIDTH, grid=GRID, node_features=0)
    (tokens,) = embed(graph, psf.groups.Symmetric(NODES), psf.Permutation(order))

    figure = plt.figure(figsize=(11, 3))
    permuted = adjacency[order[0, 0]][:, order[0, 0]]
    for left, values, title in ((0.03, adjacency, "adjacency $A$"), (0.29, permuted, "permuted $A' = g^{-1}\\cdot A$")):
        matrix(figure.add_axes((left, 0.1, 0.19, 0.7)), values, title)
    cut = figure.add_axes((0.55, 0.1, 0.19, 0.7))
    matrix(cut, permuted, f"{GRID} x {GRID} patches")
    for line in range(1, GRID):
        place = line * NODES / GRID - 0.5
        cut.axhline(place, color="#e8710a", lw=2)
        cut.axvline(place, color="#e8710a", lw=2)
    matrix(figure.add_axes((0.81, 0.1, 0.15, 0.7)), tokens[0, 0].detach(), "tokens", cmap="PuOr", aspect="auto")
    figure.text(0.885, 0.03, f"width D, {GRID**2} tokens", ha="center", color=GREY, fontsize=9)
    for left in (0.235, 0.495, 0.75):
        arrow(figure, (left, 0.45), (left + 0.045, 0.45))
    save(figure, "tokens")


if __name__ == "__main__":
    main()
