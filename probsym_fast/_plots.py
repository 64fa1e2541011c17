"""The style of figures, and saving them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from probsym_fast._files import write_atomically

PRINTED: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}


def save(figure: Figure, path: Path) -> None:
    """Writes the figure atomically, in the format of the path's suffix, and closes it."""
    buffer = BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
