"""What every figure shares: colours on light and dark ground, settings, SVG.

matplotlib's settings are changed while a figure is made and put back after.
"""

import io

import matplotlib
from matplotlib.figure import Figure

# Both are replaced by CSS variables on a page, see `DARK`.
INK, FAINT = "#1c2127", "#8b929b"
KEPT, REMOVED = "#1b7837", "#9c4fb0"
# Light and dark page, equally far from both grounds.
COLOURS = {
    "#0072b2": "#55b4f0",
    "#d55e00": "#ff8f45",
    "#00845f": "#35c99d",
    "#b0467f": "#ee9cc8",
    "#a87200": "#e8b93f",
    "#2a8ca8": "#7fd6ea",
    "#757b84": "#a3a9b2",
    "#4a3aa7": "#a99cf7",
    "#8f2237": "#f07f92",
    "#6b6a00": "#cfc94c",
}
DARK = COLOURS | {INK: "#e7eaee", FAINT: "#838b95", KEPT: "#69cf86", REMOVED: "#cf96e0"}
STYLE = matplotlib.rc_context(
    {
        "font.family": ["DejaVu Sans"],
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "text.parse_math": False,  # names are no formulas
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "axes.titlecolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "lines.linewidth": 1.7,
        "lines.markersize": 4.5,
        "grid.color": FAINT,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.7,
        "svg.fonttype": "none",  # text that can be selected and searched
        "svg.hashsalt": "jaxprune",  # the same ids in each run
    }
)


@STYLE
def svg(figure: Figure, *, ground: str = "none") -> str:
    """The figure as an SVG text with selectable text and no date.

    Args:
      figure: what is drawn.
      ground: its colour; "none" on a page that changes the ink too, as `page.inline`.
        In a file of its own dark ink needs "white": a dark page may show it.

    Returns:
      The text.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    background = {"transparent": True} if ground == "none" else {"facecolor": ground}
    figure.savefig(stream, format="svg", metadata=nothing, **background)
    return stream.getvalue()
