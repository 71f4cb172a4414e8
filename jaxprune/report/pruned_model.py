"""The page of a pruned checkpoint, made from its jaxprune.json alone.

What was not measured has no section. Names of tensors are read as layers and kinds of
matrix: what stands behind the first number, "3.mlp.up_proj" being layer 3.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from jaxprune.report import canvas, page

STAGES = ("dense", "pruned", "retrained")
_WORST = 12
_WIDEST = 40
_MAP = LinearSegmentedColormap.from_list(
    "share", [(0.84, 0.37, 0, 0), (0.84, 0.37, 0, 0.75)]
)


def document(record: Mapping[str, Any]) -> str:
    """The whole of report.html.

    Args:
      record: what jaxprune.json holds: "method", "pattern", "sparsity", "achieved",
        "tensors", "sizes", and where measured "perplexity", "weights", "samples",
        "retraining", "calibration", "phases".

    Returns:
      One HTML page that loads nothing.
    """
    parts = [
        _opening(record),
        _perplexity(record),
        _layers(record),
        _errors(record),
        _samples(record),
        _sizes(record),
        _costs(record),
        _making(record),
    ]
    return page.page("A pruned model", "\n".join(part for part in parts if part))


def headline(record: Mapping[str, Any]) -> str:
    """What happened, in a sentence.

    Args:
      record: as for `document`.

    Returns:
      Plain text.
    """
    what = (
        f"{record['achieved']:.1%} of the weights of {len(record['tensors'])} matrices "
        f"are gone by {record['method']}"
    )
    for name, of in (record.get("perplexity") or {}).items():
        last = _last(of)
        return (
            f"{what}: perplexity on {name} went from {_number(of['dense'])} to "
            f"{_number(of[last])}."
        )
    return f"{what}."


def layers(tensors: Mapping[str, float], *, logarithmic: bool, title: str) -> Figure:
    """A number for each matrix: rows are kinds, columns layers.

    Args:
      tensors: name to number; names without a layer are left out.
      logarithmic: whether colours follow the logarithm, for errors; else they go from
        0 to 1.
      title: above.

    Returns:
      The figure.
    """
    cells = {_place(name): value for name, value in tensors.items()}
    found = {place: value for place, value in cells.items() if place is not None}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    numbers = sorted({layer for layer, _ in found})
    grid = np.full((len(kinds), len(numbers)), np.nan)
    for (layer, kind), value in found.items():
        grid[kinds.index(kind), numbers.index(layer)] = value
    return _heat(grid, kinds, numbers, logarithmic=logarithmic, title=title)


@canvas.STYLE
def _heat(
    grid: np.ndarray,
    kinds: Sequence[str],
    numbers: Sequence[int],
    *,
    logarithmic: bool,
    title: str,
) -> Figure:
    narrow = len(numbers) > _WIDEST
    cell = 0.16 if narrow else 0.42
    left, right, top, low = 0.09 * max(map(len, kinds)) + 0.2, 0.2, 0.55, 0.5
    width = max(left + cell * len(numbers) + right, 0.085 * len(title) + 0.4)
    height = top + 0.3 * len(kinds) + low
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes(
        (
            left / width,
            low / height,
            cell * len(numbers) / width,
            0.3 * len(kinds) / height,
        )
    )
    norm = Normalize(0, 1)
    if logarithmic:
        positive = grid[grid > 0]
        low_end = float(positive.min()) if positive.size else 1e-6
        norm = LogNorm(low_end, max(float(np.nanmax(grid)), 1.01 * low_end))
    axes.pcolormesh(np.ma.masked_invalid(grid), cmap=_MAP, norm=norm)
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(grid):
        if not (narrow or np.isnan(value)):
            text = _small(value) if logarithmic else f"{100 * value:.0f}"
            where = (column + 0.5, row + 0.52)
            axes.text(*where, text, ha="center", va="center", size=7.5)
    step = 5 if narrow else 1
    axes.set_xticks(
        np.arange(0, len(numbers), step) + 0.5, list(map(str, numbers[::step]))
    )
    axes.set_yticks(np.arange(len(kinds)) + 0.5, kinds)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    figure.text(0.1 / width, 1 - 0.12 / height, title, size=10.5, va="top")
    return figure


def _place(name: str) -> tuple[int, str] | None:
    """The layer and the kind of a tensor, or None where it has no layer."""
    found = re.search(r"(?:^|[./])(\d+)[./](.+?)(?:[./](?:weight|kernel))?$", name)
    return (int(found[1]), found[2]) if found else None


def _opening(record: Mapping[str, Any]) -> str:
    """The headline and the few numbers that count."""
    sizes = record["sizes"]
    asked = record["sparsity"]
    facts = {
        "method": record["method"],
        "pattern": record["pattern"],
        "sparsity asked": f"{asked:.2%}" if isinstance(asked, float) else str(asked),
        "achieved": f"{record['achieved']:.4%}",
        "weights pruned": f"{sizes['size']:,}",
        "compact file": _bytes(sizes["compact_bytes"]),
        "time": _time(record["seconds"]),
        "device": record["device"],
    }
    if peak := record.get("peak_memory_bytes"):
        facts["peak memory"] = _bytes(peak)
    listed = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    lead = html.escape(headline(record))
    return f'<h1>A pruned model</h1>\n<p class="lead">{lead}</p>\n<dl>{listed}</dl>'


def _perplexity(record: Mapping[str, Any]) -> str:
    """Before and after, text by text."""
    found = record.get("perplexity")
    if not found:
        return ""
    stages = [s for s in STAGES if all(s in of for of in found.values())]
    rows = [
        [
            name,
            of["role"],
            *(_cell(of[stage]) for stage in stages),
            _number({"perplexity": of["by_frequency"]}),
            f"{of['dense']['tokens']:,}",
            str(of["context"]),
            str(of["stride"] or "rows"),
        ]
        for name, of in found.items()
    ]
    header = ["text", "what it is", *stages, "by frequency"]
    caption = (
        "Perplexity, and below it nats per token, the same tokens in every column. By "
        "frequency: what guessing each token by how often it occurs would have. Few "
        "tokens make differences of a few percent mean little."
    )
    table = page.table([*header, "tokens", "context", "stride"], rows, caption)
    begins = (record.get("calibration") or {}).get("bos")
    note = f'<p class="note">{html.escape(f"Sequences begin with {begins}.")}</p>'
    return f"<h2>Perplexity</h2>\n{table}{note if begins else ''}"


def _layers(record: Mapping[str, Any]) -> str:
    """How much of each matrix is zero."""
    tensors = record["tensors"]
    order = [
        row["name"] for row in record.get("weights") or () if row["name"] in tensors
    ]
    shares = {
        name: tensors[name]["zeros"] / max(tensors[name]["size"], 1)
        for name in dict.fromkeys([*order, *tensors])
        if _place(name) is not None
    }
    if not shares:
        return ""
    drawn = layers(shares, logarithmic=False, title="% of each matrix that is zero")
    caption = "Zeros of each pruned matrix, counted in what was written."
    picture = page.picture({"zeros": drawn}, caption, wide=True)
    return f"<h2>Sparsity by layer</h2>\n{picture}"


def _errors(record: Mapping[str, Any]) -> str:
    """What pruning did to each matrix's output."""
    rows = [row for row in record.get("weights") or () if row.get("error") is not None]
    if not rows:
        return ""
    parts = ["<h2>Error by layer</h2>"]
    errors = {row["name"]: row["error"] for row in rows}
    if any(_place(name) for name in errors):
        title = "|X(W − V)|² / |XW|² of each matrix, on the first batch"
        drawn = layers(errors, logarithmic=True, title=title)
        caption = (
            "How far each matrix's output is from that of the dense matrix on the same "
            "input, the input being what the layers pruned before it give."
        )
        parts.append(page.picture({"errors": drawn}, caption, wide=True))
    worst = sorted(rows, key=lambda row: -row["error"])[:_WORST]
    table = [
        [
            row["name"],
            " × ".join(map(str, row["shape"][-2:])),
            f"{row['zeros'] / max(row['size'], 1):.2%}",
            f"{row['error']:.3g}",
            f"{row['damping']:.3g}" if row["damping"] else "",
            f"{row['seconds']:.2f} s",
        ]
        for row in worst
    ]
    header = ["matrix", "in × out", "zeros", "error", "damping", "time"]
    caption = f"The {len(worst)} largest errors; jaxprune.json has them all."
    return "\n".join([*parts, page.table(header, table, caption)])


def _samples(record: Mapping[str, Any]) -> str:
    """Text before and after."""
    texts = "".join(
        f"<div><h3>{html.escape(sample['label'])}</h3>"
        f"<pre>{html.escape(sample['text'].strip())}</pre></div>"
        for sample in record.get("samples") or ()
    )
    if not texts:
        return ""
    return f'<h2>Text sampled before and after</h2>\n<div class="texts">{texts}</div>'


def _sizes(record: Mapping[str, Any]) -> str:
    """Bytes, as they are and packed."""
    sizes = record["sizes"]
    dense, packed = sizes["dense_bytes"], sizes["compact_bytes"]
    rows = [
        ["this folder's weights, dense with zeros", _bytes(dense), "100%"],
        ["as a compact file", _bytes(packed), f"{packed / max(dense, 1):.1%}"],
    ]
    caption = (
        "A compact file holds a bit for each weight and the weights that are left "
        "(jaxprune compact). Zeros make no hardware faster by themselves."
    )
    return f"<h2>Size</h2>\n{page.table(['form', 'bytes', 'of dense'], rows, caption)}"


def _costs(record: Mapping[str, Any]) -> str:
    """Time and memory by phase."""
    phases = record.get("phases")
    if not phases:
        return ""
    rows = [
        [of["name"], _time(of["seconds"]), _bytes(of["peak_memory_bytes"] or 0)]
        for of in phases
    ]
    table = page.table(
        ["phase", "time", "peak memory so far"], rows, "Compilation included."
    )
    return f"<h2>Time and memory</h2>\n{table}"


def _making(record: Mapping[str, Any]) -> str:
    """The command, the texts, the versions."""
    parts = [
        "<h2>How this was made</h2>",
        f"<pre>{html.escape(record['command'])}</pre>",
    ]
    if used := record.get("calibration"):
        rows = [
            [of["name"], str(of["sequences"]), of["sha256"][:16]]
            for of in used["files"]
        ]
        caption = (
            f"Calibrated on {used['sequences']} sequences of {used['length']} tokens, "
            f"seed {used['seed']}; all positions count."
        )
        header = ["text", "sequences", "SHA-256 begins"]
        parts.append(page.table(header, rows, caption))
    if again := record.get("retraining"):
        losses = again["losses"]
        text = (
            f"Retrained for {again['steps']} steps of {again['batch']} sequences at "
            f"{again['learning_rate']:g}, zeros held: loss of the first step "
            f"{losses[0]:.4f}, of the last {losses[-1]:.4f}."
        )
        parts.append(f"<p>{html.escape(text)}</p>")
    rows = [[name, version] for name, version in record["versions"].items()]
    parts.append(page.table(["versions", ""], rows))
    return "\n".join(parts)


def _last(of: Mapping[str, Any]) -> str:
    return [stage for stage in STAGES if stage in of][-1]


def _cell(result: Mapping[str, Any]) -> str:
    nats = result["nats"]
    below = "not finite" if nats is None else f"{nats:.4f}"
    return f"<td>{_number(result)}<small>{below}</small></td>"


def _number(result: Mapping[str, Any]) -> str:
    value = result["perplexity"]
    if value is None:
        return "infinite"
    return f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"


def _small(value: float) -> str:
    """An error in a cell: .012, 1.3, 8e-5."""
    if value == 0 or value >= 0.001:
        return f"{value:.2g}".removeprefix("0") or "0"
    return f"{value:.0e}".replace("e-0", "e-")


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
