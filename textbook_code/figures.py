"""The book's one figure style, and the two helpers that its pages share.

Needs the `notebook` extra.

Book: how-to-read
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, darkened where needed to stand on white; they differ in grey too.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#1f5a99", "#c2570c", "#157f5f", "#8a4f9e", "#6b7280"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, GREY)
SEQUENTIAL = "Blues"  # light to dark, so it survives grey print

_STYLE = {
    "figure.figsize": (6.4, 3.1),
    "figure.dpi": 110,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.hashsalt": "textbook_code",  # the same figure gives the same file
    "pdf.fonttype": 42,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
}


def use_style() -> None:
    """Set the book's matplotlib style; in a notebook, draw as SVG (HTML) and PDF (print).

    Raises:
        ImportError: matplotlib is missing; the message names the extra.

    Book: how-to-read
    """
    matplotlib = require("matplotlib", extra="notebook")
    matplotlib.rcParams.update(_STYLE)
    matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=CYCLE)
    try:
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    if get_ipython() is not None:
        set_matplotlib_formats("svg", "pdf")


def heatmap(
    ax: "Axes",
    weights: Any,
    rows: Sequence[str],
    cols: Sequence[str],
    *,
    title: str = "",
    values: bool = False,
) -> None:
    """Draw attention weights: one row for each query, one column for each key.

    Args:
        ax: the axes to draw on.
        weights: (T, S), between 0 and 1.
        rows: T labels, the queries.
        cols: S labels, the keys.
        title: above the picture.
        values: write each weight into its cell.

    Raises:
        ValueError: the labels do not match the weights.

    Book: attention-real
    """
    T, S = len(rows), len(cols)
    if tuple(weights.shape) != (T, S):
        raise ValueError(f"weights: expected shape (rows, cols) = {(T, S)}, got {tuple(weights.shape)}")
    ax.imshow(weights, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="equal")
    ax.set_xticks(range(S), cols, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(T), rows)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set_title(title)
    if values:
        for i in range(T):
            for j in range(S):
                shade = "white" if weights[i, j] > 0.55 else "#222222"
                text = f"{float(weights[i, j]):.2f}"
                ax.text(j, i, text, ha="center", va="center", color=shade, fontsize=8)


def glue(name: str, value: object) -> None:
    """Keep a computed value under a name, so that the page's prose can show it.

    Outside a notebook it does nothing. The stored form is the one that MyST-NB reads.

    Book: how-to-read
    """
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        prefix = "application/papermill.record/"
        record = {"scrapbook": {"name": name, "mime_prefix": prefix}}
        display({f"{prefix}text/plain": repr(value)}, metadata=record, raw=True)
