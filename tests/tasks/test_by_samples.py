"""Tables and plots of figures by samples."""

import math

import matplotlib.pyplot as plt
import pytest

from probsym_fast.tasks import by_samples as module
from probsym_fast.tasks.by_samples import by_samples, mean_and_deviation, plot, table


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([0.98765], "0.9877"),
        ([0.0040123], "0.004012"),
        ([123456.7], "123457"),
        ([672.4321, 680.1], "676.3 ± 5.4"),
        ([0.00561, 0.00562, 0.00566], "0.005630 ± 0.000026"),
        ([0.99, 0.992, 0.994], "0.9920 ± 0.0020"),
        ([0.5, 0.5], "0.5000 ± 0.0000"),
        ([0.0, 0.0], "0.0000 ± 0.0000"),
        ([1.0, math.nan], "nan ± nan"),
        ([1.0, math.inf], "inf ± nan"),
    ],
)
def test_digits(values, expected):
    """Two of the deviation; a figure that is not finite does not end a sweep."""
    assert mean_and_deviation(values) == expected


def test_a_configuration_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    """Also where it lacks a figure; the legend is of all of them."""
    figures = by_samples(
        [
            ("A", 8, {"test_accuracy": 0.5, "test_accuracy_S1": 0.4}),
            ("B", 8, {"test_accuracy": 0.6, "test_accuracy_S1": 0.5, "test_ece": 0.1, "test_ece_S1": 0.2}),
        ]
    )
    assert table(figures).splitlines()[2:] == [
        "| A | 1 | 0.4000 |  | 1 |",
        "| A | 8 | 0.5000 |  | 1 |",
        "| B | 1 | 0.5000 | 0.2000 | 1 |",
        "| B | 8 | 0.6000 | 0.1000 | 1 |",
    ]
    drawn = []
    monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure))
    plot(tmp_path / "samples.png", figures)
    (figure,) = drawn
    colors = [
        {container.get_label(): container.lines[0].get_color() for container in axes.containers} for axes in figure.axes
    ]
    assert colors[0] == colors[1] == {"A": "C0", "B": "C1"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]
    plt.close(figure)
