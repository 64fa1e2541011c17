"""Losses and measures of the experiments with vision transformers on graphs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional import mean_absolute_error
from torchmetrics.functional.classification import binary_average_precision

from probsym_fast._checks import looks_at_values

HITS = (1, 3, 10)


def weighted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy that gives less weight to frequent classes of the batch: sum_i w(y_i) l_i / sum_i w(y_i).

    l_i is the cross-entropy of node i, and w(c) = (V - V_c) / V if V_c of the V nodes are in class c. If all nodes are in
    one class, the loss is 0; the published code gets NaN and skips the batch. (Dwivedi et al., arXiv 2003.00982.)

    Args:
        logits: (V, C) floating; the loss is computed in float32 or better.
        labels: (V,) int64 in 0..C - 1.

    Returns a scalar with gradients to logits. Raises ValueError for other shapes and, on the CPU and in debug mode, for
    labels out of range; TypeError for other dtypes.
    """
    _check_classes("weighted_cross_entropy", logits, labels)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    sizes = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    sizes.index_add_(0, labels, torch.ones_like(labels, dtype=logits.dtype))
    weight = (len(labels) - sizes) / len(labels)
    total = weight[labels].sum()
    loss = cross_entropy(logits, labels, weight, reduction="sum")
    return loss / total.clamp(min=torch.finfo(logits.dtype).tiny)


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy per class, averaged over classes: mean_c |{i: y_i = argmax_i = c}| / V_c.

    Averages over the classes among the labels. (The published code also counts a class that is only predicted, as 0; on
    PATTERN both classes always occur.) The smallest class wins a tie of the logits. Args and errors as in
    `weighted_cross_entropy`. NaN raises ValueError where values are read, and else gives NaN. Returns a float64 scalar.
    """
    _check_classes("class_accuracy", logits, labels)
    if looks_at_values(logits):
        _check_no_nan("class_accuracy", "logits", logits)
    first = (logits == logits.amax(1, keepdim=True)).int().argmax(1)
    right = (first == labels).double()
    sizes, hits = right.new_zeros(2, logits.shape[1])
    sizes.index_add_(0, labels, torch.ones_like(right))
    hits.index_add_(0, labels, right)
    mean = (hits / sizes.clamp(min=1)).sum() / (sizes > 0).sum()
    return mean.where(~logits.isnan().any(), torch.nan)


def batched_class_accuracy(logits: Tensor, labels: Tensor, ptr: Tensor, graphs: int = 128) -> Tensor:
    """`class_accuracy` averaged over groups of `graphs` consecutive graphs: the measure of PATTERN for any batch size.

    As published, a smaller last group counts as much as the others.

    Args:
        logits: (V, C), labels: (V,): all nodes of the set, in order.
        ptr: (G + 1,) int64, the graphs' node offsets.

    Returns a float64 scalar. Raises as `class_accuracy`, and ValueError if ptr does not cover the nodes.
    """
    if graphs < 1:
        raise ValueError(f"batched_class_accuracy: graphs must be at least 1, got {graphs}")
    if ptr.ndim != 1 or len(ptr) < 2 or int(ptr[0]) != 0 or int(ptr[-1]) != len(labels):
        wanted = f"offsets from 0 to {len(labels)} nodes"
        raise ValueError(f"batched_class_accuracy: ptr must be {wanted}, got {tuple(ptr.shape)}: {ptr[:1]}..{ptr[-1:]}")
    counts = ptr[[*range(0, len(ptr) - 1, graphs), -1]].diff().tolist()
    parts = zip(logits.split(counts), labels.split(counts), strict=True)
    return torch.stack([class_accuracy(*part) for part in parts]).mean()


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean over tasks of sum_k (R_k - R_{k-1}) P_k: precision and recall at each distinct score, from the highest down.

    Skips missing labels, and tasks without a positive label. Equal scores enter together (scikit-learn's rule), so their
    order does not matter. Only the order of scores matters: logits and probabilities give the same result.

    Args:
        scores: (G, T) floating, finite or infinite.
        labels: (G, T) floating: 0, 1, or NaN if missing.

    Returns a float32 scalar. Raises ValueError for other shapes and values, and if no task has a positive label.
    """
    if scores.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(
            f"average_precision: scores and labels must both be (G, T), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    _check_no_nan("average_precision", "scores", scores)
    given = ~labels.isnan()
    if not ((labels == 0) | (labels == 1) | ~given).all():
        wrong = labels[given & (labels != 0) & (labels != 1)][0].item()
        raise ValueError(f"average_precision: labels must be 0, 1 or NaN, got {wrong}")
    values = []
    for task in range(labels.shape[1]):
        y = labels[given[:, task], task].long()
        if y.any():
            _, place = scores[given[:, task], task].unique(
                return_inverse=True
            )  # ranks: a sigmoid would round distinct scores to equal ones
            values.append(binary_average_precision(place.double() / len(place), y))
    if not values:
        raise ValueError("average_precision: labels must have a positive in some task, got none")
    return torch.stack(values).mean()


def mae(prediction: Tensor, target: Tensor) -> Tensor:
    """mean |prediction - target| over all entries, in float64; ValueError unless the shapes are equal and not empty."""
    _check_regression("mae", prediction, target, 1)
    return mean_absolute_error(prediction.double(), target.double())


def r2(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean over targets of 1 - sum (y - f)^2 / sum (y - mean y)^2, in float64.

    A constant target gives 1 if it is predicted exactly, else 0 (scikit-learn's rule; torchmetrics treats small sums as 0).

    Args:
        prediction, target: (G, T), G >= 2.

    Returns a scalar. Raises ValueError for other shapes.
    """
    _check_regression("r2", prediction, target, 2)
    f, y = prediction.double(), target.double()
    rest, spread = (y - f).square().sum(0), (y - y.mean(0)).square().sum(0)
    constant = (y == y[0]).all(0)
    return torch.where(constant, ((y == f).all(0)).double(), 1 - rest / spread.masked_fill(constant, 1.0)).mean()


def all_pairs(ptr: Tensor) -> Tensor:
    """All ordered pairs of nodes (i, j) of each graph, (2, sum n^2) global node numbers, ordered by graph, i, j.

    `contact_measures` takes scores in this order. ptr: (G + 1,) int64.
    """
    nodes = ptr.diff()
    n = nodes.repeat_interleave(nodes)  # size of each node's graph
    head = torch.arange(len(n), device=ptr.device).repeat_interleave(n)
    row = n.cumsum(0) - n  # first pair of each head
    tail = torch.arange(len(head), device=ptr.device) - row[head] + ptr[:-1].repeat_interleave(nodes)[head]
    return torch.stack([head, tail])


def contact_measures(scores: Tensor, ptr: Tensor, edge_label_index: Tensor, edge_label: Tensor) -> dict[str, Tensor]:
    """Hits@1, 3, 10 and MRR of PCQM-Contact: the rank of the tail j of a positive pair (i, j) among all tails of i.

    rank = 1 + |{k in K: s_ik > s_ij}| + |{k in K: s_ik = s_ij}| / 2, Hits@m = [rank <= m], MRR = 1 / rank. Half of the ties
    is the mean of best and worst order (the published code leaves ties to the sort). The candidates K:

    - raw, as in the benchmark (arXiv 2206.08164): all nodes of the graph except j;
    - "_filtered": without the tails of other positive pairs of i;
    - "_filtered_noself" (Toenshoff et al. 2023, arXiv 2309.00367, "extended"): also without i.

    Args:
        scores: (sum n^2,) floating, in the order of `all_pairs`; no NaN.
        ptr: (G + 1,) int64, the graphs' node offsets.
        edge_label_index: (2, M) int64, global node numbers of labelled pairs, both nodes in one graph.
        edge_label: (M,), 1 for a positive pair, 0 for the others, which are ignored.

    Returns hits@1, hits@3, hits@10 and mrr, each with the three endings ("" for raw). Each is the mean over the positive
    pairs of a graph: (graphs with positive pairs,) float64, in order. The measure of a set is the mean over all its graphs.
    Raises ValueError for other shapes, NaN, other labels, and pairs across graphs.
    """
    nodes = ptr.diff()
    if scores.shape != (total := int(nodes.square().sum()),):
        raise ValueError(f"contact_measures: scores must be (sum n^2,) = ({total},), got {tuple(scores.shape)}")
    if edge_label_index.ndim != 2 or edge_label_index.shape[0] != 2 or edge_label.shape != edge_label_index.shape[1:]:
        got = f"{tuple(edge_label_index.shape)} and {tuple(edge_label.shape)}"
        raise ValueError(f"contact_measures: edge_label_index and edge_label must be (2, M) and (M,), got {got}")
    _check_no_nan("contact_measures", "scores", scores)
    if (other := (edge_label != 0) & (edge_label != 1)).any():
        raise ValueError(f"contact_measures: edge_label must be 0 or 1, got {edge_label[other][0].item()}")
    if edge_label_index.numel() and not 0 <= int(edge_label_index.min()) <= int(edge_label_index.max()) < int(ptr[-1]):
        got = f"{int(edge_label_index.min())} to {int(edge_label_index.max())}"
        raise ValueError(f"contact_measures: edge_label_index must be in 0..{int(ptr[-1]) - 1}, got {got}")
    head, tail = edge_label_index[:, edge_label == 1]  # (P,)
    graph, other = (torch.bucketize(i, ptr[1:], right=True) for i in (head, tail))
    if (graph != other).any():
        p = int((graph != other).nonzero()[0])
        got = f"({int(head[p])}, {int(tail[p])}) of graphs {int(graph[p])} and {int(other[p])}"
        raise ValueError(f"contact_measures: edge_label_index must hold pairs within a graph, got {got}")
    i, j, n = head - ptr[graph], tail - ptr[graph], nodes[graph]
    row = (nodes.square().cumsum(0) - nodes.square())[graph] + i * n  # first pair of each head
    positive = torch.zeros(total, dtype=torch.bool, device=scores.device)
    positive[row + j] = True
    k = torch.arange(int(n.max()) if len(n) else 0, device=scores.device)  # (K,) tails
    pair = row[:, None] + k.clamp(max=(n - 1)[:, None])  # (P, K)
    raw = (k < n[:, None]) & (k != j[:, None])
    filtered = raw & ~positive[pair]
    found, own = scores[pair], scores[row + j][:, None]
    count = torch.bincount(graph, minlength=len(nodes))
    some = count > 0
    out = {}
    for ending, candidates in (
        ("", raw),
        ("_filtered", filtered),
        ("_filtered_noself", filtered & (k != i[:, None])),
    ):
        above, equal = ((candidates & test).sum(1).double() for test in (found > own, found == own))
        rank = 1 + above + equal / 2
        for name, value in (*((f"hits@{m}", (rank <= m).double()) for m in HITS), ("mrr", 1 / rank)):
            sums = rank.new_zeros(len(nodes)).index_add(0, graph, value)
            out[name + ending] = sums[some] / count[some]
    return out


def _check_classes(where: str, logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or 0 in logits.shape:
        got = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{where}: logits and labels must be (V, C) and (V,), neither empty, got {got}")
    if not logits.is_floating_point() or labels.dtype != torch.int64:
        got = f"{logits.dtype} and {labels.dtype}"
        raise TypeError(f"{where}: logits and labels must be floating and int64, got {got}")
    if looks_at_values(labels) and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        got = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"{where}: labels must be in 0..{logits.shape[1] - 1}, got {got}")


def _check_regression(where: str, prediction: Tensor, target: Tensor, least: int) -> None:
    if prediction.shape != target.shape or prediction.ndim != 2 or len(target) < least or 0 in target.shape:
        got = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise ValueError(f"{where}: prediction and target must both be (G, T) with G >= {least}, got {got}")


def _check_no_nan(where: str, name: str, values: Tensor) -> None:
    if values.isnan().any():
        raise ValueError(f"{where}: {name} must hold no NaN, got {int(values.isnan().sum())} of {values.numel()}")
