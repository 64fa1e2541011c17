import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

sklearn = pytest.importorskip("sklearn.metrics")
pytest.importorskip("torchmetrics")

from probsym_fast.tasks.measures import (  # noqa: E402
    all_pairs,
    average_precision,
    batched_class_accuracy,
    class_accuracy,
    contact_measures,
    mae,
    r2,
    weighted_cross_entropy,
)
from probsym_fast.tasks.vision import binary_loss  # noqa: E402

NAN = float("nan")


def logits_and_labels(V=200, C=2, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    labels = (torch.rand(V, generator=random) * 1.3).clamp(max=0.99).mul(C).long()
    return torch.randn(V, C, generator=random, dtype=dtype).requires_grad_(), labels


# --- PATTERN ---


@pytest.mark.parametrize("C", [2, 4])
def test_weighted_cross_entropy_is_that_of_balanced_frequencies(C):
    logits, labels = logits_and_labels(C=C)
    weight = torch.tensor([1 - (labels == c).double().mean().item() for c in range(C)], dtype=torch.float64)
    found = weighted_cross_entropy(logits, labels)
    torch.testing.assert_close(found, cross_entropy(logits, labels, weight), rtol=1e-12, atol=0)
    if C == 2:  # both classes then have the same total weight
        means = [cross_entropy(logits[labels == c], labels[labels == c]) for c in range(2)]
        torch.testing.assert_close(found, sum(means) / 2, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(
        lambda z: weighted_cross_entropy(z, labels[:7]), logits[:7].detach().requires_grad_()
    )


def test_weighted_cross_entropy_without_a_class():
    logits, labels = logits_and_labels(C=3)
    labels[labels == 1] = 2  # class 1 is absent: it plays no part
    weight = torch.tensor([(labels != 0).double().mean(), 0, (labels != 2).double().mean()])
    expected = cross_entropy(logits, labels, weight)
    torch.testing.assert_close(weighted_cross_entropy(logits, labels), expected, rtol=1e-12, atol=0)
    loss = weighted_cross_entropy(logits, torch.ones_like(labels))  # one class only
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_weighted_cross_entropy_in_low_precision():
    logits, labels = logits_and_labels(dtype=torch.float32)
    low = logits.detach().bfloat16()
    expected = weighted_cross_entropy(low.double(), labels)
    assert weighted_cross_entropy(low, labels).dtype == torch.float32
    torch.testing.assert_close(weighted_cross_entropy(low, labels).double(), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(weighted_cross_entropy(low, labels).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("C", [2, 5])
def test_class_accuracy_is_balanced_accuracy(C):
    logits, labels = logits_and_labels(C=C)
    expected = sklearn.balanced_accuracy_score(labels, logits.argmax(1))
    assert class_accuracy(logits, labels).item() == pytest.approx(expected, abs=1e-14)
    labels[labels == 1] = 0  # absent among the labels, yet predicted
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = sklearn.balanced_accuracy_score(labels, logits.argmax(1))
    assert class_accuracy(logits, labels).item() == pytest.approx(expected, abs=1e-14)


def test_class_accuracy_with_ties_takes_the_smallest_class():
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 0, 1, 2])
    logits[3, 1:] = 1.0
    assert class_accuracy(logits, labels).item() == pytest.approx((1 + 0 + 0) / 3)
    assert class_accuracy(logits[3:], torch.tensor([1])).item() == 1


def test_where_values_are_not_read_nan_propagates(monkeypatch):
    """As on a GPU outside debug mode: nothing waits for it."""
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = class_accuracy(logits, labels)
    monkeypatch.setattr("probsym_fast.tasks.measures.looks_at_values", lambda x: False)
    assert class_accuracy(logits, labels) == expected
    logits[2, 1] = torch.nan
    assert class_accuracy(logits, labels).isnan()


def test_binary_loss_is_the_mean_over_known_labels():
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(2, (4, 3)).double()
    missing = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]], dtype=torch.bool)
    expected = binary_cross_entropy_with_logits(logits[~missing], labels[~missing])
    (wanted,) = torch.autograd.grad(expected, logits)
    loss = binary_loss(logits, labels.masked_fill(missing, torch.nan))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
    none = binary_loss(logits, torch.full_like(labels, torch.nan))
    assert none == 0 and not torch.autograd.grad(none, logits)[0].any()


def test_batches_of_graphs_are_averaged():
    logits, labels = logits_and_labels(V=180)
    ptr = torch.tensor([0, 40, 41, 90, 130, 180])  # one graph has a single node
    parts = [class_accuracy(logits[a:b], labels[a:b]) for a, b in ((0, 41), (41, 130), (130, 180))]
    assert batched_class_accuracy(logits, labels, ptr, graphs=2).item() == pytest.approx(
        sum(parts).item() / 3, abs=1e-14
    )
    assert torch.equal(batched_class_accuracy(logits, labels, ptr), class_accuracy(logits, labels))
    singles = batched_class_accuracy(logits[:3], torch.tensor([0, 1, 1]), torch.arange(4), graphs=1)
    assert singles.item() == pytest.approx((logits[:3].argmax(1) == torch.tensor([0, 1, 1])).double().mean().item())


@pytest.mark.parametrize("measure", [weighted_cross_entropy, class_accuracy])
@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (torch.ones(3), torch.ones(3).long(), ValueError, r"must be \(V, C\) and \(V,\), neither empty, got \(3,\)"),
        (torch.ones(3, 2), torch.ones(4).long(), ValueError, r"neither empty, got \(3, 2\) and \(4,\)"),
        (torch.ones(0, 2), torch.ones(0).long(), ValueError, r"neither empty, got \(0, 2\) and \(0,\)"),
        (torch.ones(3, 2), torch.ones(3), TypeError, "floating and int64, got torch.float32 and torch.float32"),
        (
            torch.ones(3, 2).int(),
            torch.ones(3).long(),
            TypeError,
            "floating and int64, got torch.int32 and torch.int64",
        ),
        (torch.ones(3, 2), torch.tensor([0, 1, 2]), ValueError, r"labels must be in 0..1, got 0 to 2"),
        (torch.ones(3, 2), torch.tensor([0, 1, -1]), ValueError, r"labels must be in 0..1, got -1 to 1"),
    ],
)
def test_wrong_classes(measure, logits, labels, kind, message):
    with pytest.raises(kind, match=f"{measure.__name__}: .*{message}"):
        measure(logits, labels)


def test_wrong_batches():
    logits, labels = logits_and_labels(V=5)
    for ptr in (torch.tensor([0, 4]), torch.tensor([1, 5]), torch.tensor([0]), torch.tensor([[0, 5]])):
        with pytest.raises(ValueError, match="batched_class_accuracy: ptr must be offsets from 0 to 5 nodes, got"):
            batched_class_accuracy(logits, labels, ptr)
    with pytest.raises(ValueError, match="batched_class_accuracy: graphs must be at least 1, got 0"):
        batched_class_accuracy(logits, labels, torch.tensor([0, 5]), graphs=0)
    with pytest.raises(ValueError, match="class_accuracy: logits must hold no NaN, got 2 of 10"):
        class_accuracy(logits.detach().index_fill(0, torch.tensor([1]), NAN), labels)


# --- Peptides ---


def scores_and_labels(G=300, T=10, seed=0):
    random = torch.Generator().manual_seed(seed)
    labels = (torch.rand(G, T, generator=random) < 0.2).double()
    return torch.randn(G, T, generator=random, dtype=torch.float64) + labels, labels


@pytest.mark.parametrize("decimals", [8, 1, 0])  # the fewer, the more ties
def test_average_precision_is_that_of_scikit_learn(decimals):
    scores, labels = scores_and_labels()
    scores = scores.round(decimals=decimals)
    labels[::7, 3], labels[:100, 5] = NAN, NAN  # missing
    expected = []
    for t in range(10):
        given = ~labels[:, t].isnan()
        expected.append(sklearn.average_precision_score(labels[given, t], scores[given, t]))
    found = average_precision(scores, labels).item()
    assert found == pytest.approx(sum(expected) / 10, rel=1e-6)
    order = torch.randperm(300)
    assert average_precision(scores[order], labels[order]).item() == pytest.approx(found, rel=1e-6)


def test_tasks_without_positives_are_left_out():
    scores, labels = scores_and_labels()
    expected = average_precision(scores[:, [0, 3]], labels[:, [0, 3]])
    labels[:, 1], labels[:, 2] = 0, NAN
    torch.testing.assert_close(average_precision(scores[:, :4], labels[:, :4]), expected)
    labels[0, 2] = 1  # a single given label, positive
    assert average_precision(scores[:, 2:3], labels[:, 2:3]).item() == 1


def test_large_logits_keep_their_order():
    scores, labels = scores_and_labels()
    expected = average_precision(scores, labels)
    for transformed in (scores + 60, (scores * 20).float(), scores.sigmoid()):
        torch.testing.assert_close(average_precision(transformed, labels), expected)


def test_wrong_scores():
    scores, labels = scores_and_labels(G=4, T=2)
    with pytest.raises(
        ValueError, match=r"average_precision: scores and labels must both be .*got \(4, 2\) and \(4,\)"
    ):
        average_precision(scores, labels[:, 0])
    with pytest.raises(ValueError, match=r"average_precision: labels must be 0, 1 or NaN, got 2.0"):
        average_precision(scores, torch.full((4, 2), 2.0))
    with pytest.raises(ValueError, match="average_precision: labels must have a positive in some task, got none"):
        average_precision(scores, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="average_precision: scores must hold no NaN, got 8 of 8"):
        average_precision(scores * NAN, labels)


def test_errors_are_those_of_scikit_learn():
    f, y = torch.randn(2, 50, 11)
    y[:, 4] = 2.5  # constant targets: missed, and met
    y[:, 7] = f[:, 7] = -0.1
    y[:, 2] *= 1e-4
    f[:, 2] = y[:, 2] * 1.1  # sums of squares near 1e-7
    assert mae(f, y).item() == pytest.approx(sklearn.mean_absolute_error(y, f), rel=1e-6)
    assert r2(f, y).item() == pytest.approx(sklearn.r2_score(y.double(), f.double()), rel=1e-9)
    assert r2(f[:, 2:3], y[:, 2:3]).item() == pytest.approx(sklearn.r2_score(y[:, 2], f[:, 2]), rel=1e-5)
    assert r2(y, y).item() == 1
    assert r2(y[:, :2].double().mean(0).expand(50, 2), y[:, :2]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("measure", "least"), [(mae, 1), (r2, 2)])
def test_wrong_targets(measure, least):
    wrong = [(least, 2, 1), (least - 1, 3), (least,)]
    for shape in wrong:
        with pytest.raises(ValueError, match=rf"{measure.__name__}: .* must both be \(G, T\) with G >= {least}, got"):
            measure(torch.ones(shape), torch.ones(shape))
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3, 1\)"):
        measure(torch.ones(3, 2), torch.ones(3, 1))
    assert measure(torch.ones(least, 2), torch.ones(least, 2)).item() == {"mae": 0, "r2": 1}[measure.__name__]


# --- PCQM-Contact ---

SIZES = [7, 1, 12, 5, 9]
NAMES = [f"{m}{e}" for e in ("", "_filtered", "_filtered_noself") for m in ("hits@1", "hits@3", "hits@10", "mrr")]


def contacts(sizes=SIZES, seed=0, share=0.3, levels=None):
    """Scores of all pairs, ptr, labelled pairs and labels; `levels`: that many distinct scores."""
    random = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    pairs = all_pairs(ptr)
    scores = torch.randn(pairs.shape[1], generator=random, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, scores.shape, generator=random).double()
    labelled = (torch.rand(pairs.shape[1], generator=random) < share) & (pairs[0] != pairs[1])
    index = pairs[:, labelled][:, torch.randperm(int(labelled.sum()), generator=random)]
    return scores, ptr, index, torch.randint(2, index.shape[1:], generator=random)


def brute_force(scores, ptr, index, label):
    """The definitions, pair by pair: {name: [a mean for each graph with positives]}."""
    out = {name: [] for name in NAMES}
    start = 0
    for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist(), strict=True):
        n = b - a
        s = scores[start : start + n * n].view(n, n)
        start += n * n
        positives = [
            (i - a, j - a) for (i, j), y in zip(index.T.tolist(), label.tolist(), strict=True) if y and a <= i < b
        ]
        values = {name: [] for name in NAMES}
        for i, j in positives:
            raw = [k for k in range(n) if k != j]
            filtered = [k for k in raw if (i, k) not in positives]
            noself = [k for k in filtered if k != i]
            for ending, candidates in (("", raw), ("_filtered", filtered), ("_filtered_noself", noself)):
                better = sum(bool(s[i, k] > s[i, j]) for k in candidates)
                rank = 1 + better + sum(bool(s[i, k] == s[i, j]) for k in candidates) / 2
                values[f"mrr{ending}"].append(1 / rank)
                for m in (1, 3, 10):
                    values[f"hits@{m}{ending}"].append(float(rank <= m))
        for name in NAMES:
            if positives:
                out[name].append(sum(values[name]) / len(positives))
    return out


def test_all_pairs():
    ptr = torch.tensor([0, 2, 3, 3, 6])
    expected = [(i, j) for a, b in ((0, 2), (2, 3), (3, 6)) for i in range(a, b) for j in range(a, b)]
    assert all_pairs(ptr).T.tolist() == [list(pair) for pair in expected]
    assert all_pairs(torch.tensor([0])).shape == (2, 0)


@pytest.mark.parametrize("levels", [None, 6, 2, 1])
@pytest.mark.parametrize("seed", range(3))
def test_contacts_are_the_brute_force_ones(levels, seed):
    case = contacts(seed=seed, levels=levels)
    found, expected = contact_measures(*case), brute_force(*case)
    assert list(found) == NAMES
    for name in NAMES:
        assert found[name].tolist() == pytest.approx(expected[name], abs=1e-14), name
    assert len(found["mrr"]) < len(SIZES)  # the graph of one node has no positive pair


def test_contacts_of_a_known_case():
    scores = torch.tensor([[9.0, 5, 7, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).flatten()
    index, label = torch.tensor([[0, 0, 0], [1, 2, 3]]), torch.tensor([1, 1, 0])
    found = {name: value.item() for name, value in contact_measures(scores, torch.tensor([0, 4]), index, label).items()}
    # tail 1 is behind 0 (itself) and 2 (a contact), tail 2 behind 0
    assert found["mrr"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found["mrr_filtered"] == pytest.approx(1 / 2)
    assert found["mrr_filtered_noself"] == 1
    assert [found[f"hits@{m}"] for m in (1, 3, 10)] == [0, 1, 1]
    assert found["hits@1_filtered"] == 0 and found["hits@1_filtered_noself"] == 1


def test_graphs_without_positives_are_left_out():
    scores, ptr, index, label = contacts()
    first = (index < ptr[1]).all(0)
    label[first] = 0
    found = contact_measures(scores, ptr, index, label)
    rest = contact_measures(scores[49:], ptr[1:] - 7, index[:, ~first] - 7, label[~first])
    assert all(torch.equal(found[name], rest[name]) for name in NAMES)
    none = contact_measures(scores, ptr, index, torch.zeros_like(label))
    assert all(value.shape == (0,) for value in none.values())
    empty = contact_measures(scores, ptr, index[:, :0], label[:0])
    assert all(value.shape == (0,) for value in empty.values())


def test_single_nodes_and_infinite_scores():
    one = contact_measures(torch.zeros(1), torch.tensor([0, 1]), torch.zeros(2, 1).long(), torch.ones(1))
    assert all(value.tolist() == [1.0] for value in one.values())  # no rivals
    scores = torch.tensor([0.0, -float("inf"), -float("inf"), float("inf")])
    two = contact_measures(scores, torch.tensor([0, 2]), torch.tensor([[0], [1]]), torch.ones(1))
    assert two["mrr"].item() == 1 / 2 and two["mrr_filtered_noself"].item() == 1


def test_wrong_contacts():
    scores, ptr, index, label = contacts()
    total = sum(n * n for n in SIZES)
    with pytest.raises(ValueError, match=rf"contact_measures: scores must be \(sum n\^2,\) = \({total},\), got \(3,\)"):
        contact_measures(scores[:3], ptr, index, label)
    with pytest.raises(ValueError, match=r"must be \(2, M\) and \(M,\), got \(2, \d+\) and \(2,\)"):
        contact_measures(scores, ptr, index, label[:2])
    with pytest.raises(ValueError, match=f"contact_measures: scores must hold no NaN, got 1 of {total}"):
        contact_measures(scores.index_fill(0, torch.tensor([5]), NAN), ptr, index, label)
    with pytest.raises(ValueError, match=rf"edge_label_index must be in 0..{sum(SIZES) - 1}, got 0 to {sum(SIZES)}"):
        contact_measures(scores, ptr, torch.tensor([[0], [sum(SIZES)]]), torch.ones(1))
    with pytest.raises(ValueError, match=r"pairs within a graph, got \(0, 8\) of graphs 0 and 2"):
        contact_measures(scores, ptr, torch.tensor([[0], [8]]), torch.ones(1))


@pytest.mark.parametrize(("wrong", "got"), [(2, "2"), (-1, "-1"), (0.5, "0.5"), (NAN, "nan")])
def test_wrong_contact_labels(wrong, got):
    scores, ptr, index, label = contacts()
    label = label.to(torch.int64 if isinstance(wrong, int) else torch.float32)
    label[3] = wrong
    with pytest.raises(ValueError, match=f"^contact_measures: edge_label must be 0 or 1, got {got}$"):
        contact_measures(scores, ptr, index, label)
