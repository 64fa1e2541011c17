"""Pairs of graphs that the 1-WL test cannot distinguish, one of each pair 2-colourable; and the 1-WL test.

A pair shares a base graph: connected, not bipartite, each node with a feature 0 or 1. Its 2-lifts have two copies u0, u1
of every node u; an edge uv becomes u0v0, u1v1 or, if it is crossed, u0v1, u1v0. A copy has copies of its original's
neighbours. So colour refinement ends with the colours of the base, each on twice as many nodes, whichever edges are crossed.
It cannot distinguish two lifts of one base (Angluin, STOC 1980: covers of a graph look alike to any local algorithm).

Label 1: all edges are crossed, so every edge joins a 0 to a 1, and the lift is bipartite. Label 0: edges are crossed at
random such that the lift is connected and not bipartite. So the two are connected but not isomorphic, and the label is a
property of the isomorphism class: whether "neighbours differ" can be satisfied. The same random connected bipartite part is
added to both graphs of a pair, which does not affect the label, and the nodes are shuffled.

Sizes follow EXP (arXiv 2010.01179): a core of 16, 24 or 32 nodes with 5/4 as many edges, plus a part that differs between
pairs; 44.5 nodes and 110 directed edges on average. As in EXP, a few cores serve many pairs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from probsym_fast.data._graphs import graph

BASE_NODES = (8, 12, 16)
PART_NODES = (9, 32)  # smallest and largest
BASE_EDGES, PART_EDGES = 1.25, 1.225  # per node
ONES = 0.6  # share of nodes with feature 1

Edges = list[tuple[int, int]]  # each edge once


def wl_pairs(count: int = 600, seed: int = 0, cores: int = 3) -> list[Any]:
    """2 * count graphs of 25 to 64 nodes; graphs 2k (label 1, 2-colourable) and 2k + 1 (label 0) are a pair.

    Args:
        count: number of pairs.
        seed: seed of the generator; gives the same graphs on every machine.
        cores: number of base graphs, at least 1; pair k has base k modulo `cores`. EXP has 3. More are harder to learn (a
            small MLP on nodes in Laplacian order: 99 % on held-out pairs with 3, 97 % on EXP, 80 % with 12).

    Returns torch_geometric `Data` with x (n, 2) float32 = [feature, degree], edge_index (2, E) int64, every edge in both
    directions, and y (1,) int64. Raises ValueError for a negative count or cores below 1, ModuleNotFoundError without
    torch_geometric.
    """
    if count < 0 or cores < 1:
        raise ValueError(f"wl_pairs: count must be at least 0 and cores at least 1, got {count} and {cores}")
    random = np.random.RandomState(seed)
    pool = [_core(BASE_NODES[k % len(BASE_NODES)], random) for k in range(min(cores, count))]
    graphs = []
    for k in range(count):
        lifts, core_feature = pool[k % len(pool)]
        part, part_feature = _part(random)
        feature = np.concatenate([core_feature, part_feature])
        shift = len(core_feature)
        for label, lift in zip((1, 0), lifts, strict=True):
            edges = lift + [(u + shift, v + shift) for u, v in part]
            graphs.append(_shuffled(edges, feature, label, random))
    return graphs


def wl_colors(edge_index: Tensor, x: Tensor) -> Tensor:
    """Colour refinement, the 1-WL test: (n,) int64 colours from 0, equal for nodes that it cannot distinguish.

    Args:
        edge_index: (2, E) int64, every edge in both directions.
        x: (n, c), initial colours: nodes with equal rows start equal.

    Cost: at most n rounds of an (n, n) matrix times an (n, colours) one.
    """
    colors = torch.unique(x, dim=0, return_inverse=True)[1]
    adjacency = torch.zeros(len(x), len(x))
    adjacency[edge_index[0], edge_index[1]] = 1
    found = 0
    while (now := int(colors.max()) + 1 if len(colors) else 0) > found:
        found = now
        neighbors = adjacency @ torch.nn.functional.one_hot(colors, found).float()  # (n, colours)
        colors = torch.unique(torch.cat([colors[:, None], neighbors.long()], 1), dim=0, return_inverse=True)[1]
    return colors


def wl_equivalent(a: Any, b: Any) -> bool:
    """Whether the 1-WL test, starting from x, finds every colour equally often in graphs `a` and `b`."""
    if a.x.shape != b.x.shape:
        return False
    n = len(a.x)
    colors = wl_colors(torch.cat([a.edge_index, b.edge_index + n], 1), torch.cat([a.x, b.x]))  # of the union
    return torch.equal(colors[:n].sort()[0], colors[n:].sort()[0])


def two_coloring(n: int, edges: Edges) -> tuple[int, bool]:
    """Number of connected components of a graph, and whether it is bipartite."""
    neighbors: list[list[int]] = [[] for _ in range(n)]
    for u, v in edges:
        neighbors[u].append(v)
        neighbors[v].append(u)
    side = [-1] * n
    parts = 0
    for start in range(n):
        if side[start] >= 0:
            continue
        parts += 1
        side[start], stack = 0, [start]
        while stack:
            u = stack.pop()
            for v in neighbors[u]:
                if side[v] < 0:
                    side[v] = 1 - side[u]
                    stack.append(v)
    return parts, all(side[u] != side[v] for u, v in edges)


def _core(nodes: int, random: np.random.RandomState) -> tuple[tuple[Edges, Edges], np.ndarray]:
    """The bipartite lift of a random base graph, another lift that is not, and the features (2 * nodes,)."""
    while True:
        base = _connected(nodes, round(BASE_EDGES * nodes), random, bipartite=False)
        if not two_coloring(nodes, base)[1]:
            break
    while True:
        other = _lift(nodes, base, random.random_sample(len(base)) < 0.5)
        if two_coloring(2 * nodes, other) == (1, False):
            break
    feature = random.random_sample(nodes) < ONES
    return (_lift(nodes, base, np.ones(len(base), bool)), other), np.tile(feature, 2)


def _lift(nodes: int, base: Edges, crossed: np.ndarray) -> Edges:
    """Copy i of node u is u + i * nodes."""
    return [(u + i * nodes, v + (i ^ int(c)) * nodes) for (u, v), c in zip(base, crossed, strict=True) for i in (0, 1)]


def _part(random: np.random.RandomState) -> tuple[Edges, np.ndarray]:
    nodes = random.randint(PART_NODES[0], PART_NODES[1] + 1)
    edges = _connected(nodes, round(PART_EDGES * nodes), random, bipartite=True)
    return edges, random.random_sample(nodes) < ONES


def _connected(nodes: int, count: int, random: np.random.RandomState, bipartite: bool) -> Edges:
    """A random tree plus random edges, `count` edges in all; with `bipartite`, none within a side."""
    parent = [random.randint(v) for v in range(1, nodes)]
    tree = [(u, v) for v, u in enumerate(parent, 1)]
    known = set(tree)
    depth = [0] * nodes
    for u, v in tree:
        depth[v] = depth[u] + 1
    more = [
        (u, v)
        for v in range(nodes)
        for u in range(v)
        if (u, v) not in known and not (bipartite and (depth[u] + depth[v]) % 2 == 0)
    ]
    chosen = random.permutation(len(more))[: count - len(tree)]
    return tree + [more[i] for i in chosen]


def _shuffled(edges: Edges, feature: np.ndarray, label: int, random: np.random.RandomState) -> Any:
    place = random.permutation(len(feature))
    u, v = place[np.array(edges).T]
    both = np.stack([np.concatenate([u, v]), np.concatenate([v, u])])
    both = both[:, np.lexsort(both[::-1])]
    shuffled = np.empty(len(feature), np.float32)
    shuffled[place] = feature
    return graph(torch.from_numpy(shuffled), torch.from_numpy(both), label)
