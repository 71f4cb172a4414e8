"""A self-contained HTML page: tables and inline figures that follow light and dark.

Nothing is loaded from elsewhere and no script runs. The templates beside this module
escape all text, so that callers pass plain text.
"""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from jaxprune.lm.report import canvas
from jaxprune.lm.report.stages import measured

_OWN = Path(__file__).with_name("templates")


def templates(*folders: Path) -> jinja2.Environment:
    """The templates of these folders, which may extend those beside this module."""
    # A record that lacks a value is an error here and not a gap on the page.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _OWN]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"variables": variables, "picture": picture}
    environment.filters |= {
        "bits": bits,
        "bytes": size,
        "duration": duration,
        "perplexity": perplexity,
    }
    return environment


def render(template: str, **values: Any) -> str:
    """A whole HTML page from a template of this package, filled with plain values."""
    return templates().get_template(template).render(values)


def picture(drawn: Mapping[str, Figure], caption: str, *, wide: bool = False) -> str:
    """Figures side by side, below each other where the page is narrow."""
    # Their names are unique on the page; `wide` ones take a line each and may scroll.
    figures = []
    for name, figure in drawn.items():
        inches = figure.get_figwidth()
        size = f"max-width:{96 * inches:.0f}px"
        size += f";min-width:{70 * inches:.0f}px" if wide else ""
        opening = f'<svg role="img" aria-label="{html.escape(caption)}" style="{size}"'
        figures.append(inline(figure, name).replace("<svg", opening, 1))
    parts: Any = templates().get_template("parts.html").module
    return str(parts.picture(figures, caption, wide))


def inline(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for HTML that follows the page's colours."""
    # `name`, which no other figure on the page has, is put before every id; colours are
    # CSS variables (see `variables`).
    text = canvas.svg(figure)
    text = text[text.index("<svg") :]  # the declaration is for files
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", text, count=4)
    text = text.replace("xlink:href", "href")  # HTML knows no namespaces
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour in canvas.DARK:
        text = text.replace(colour, f"var(--{colour[1:]})")
    return text


def variables(*, dark: bool) -> str:
    """The CSS variables that `inline` refers to, for a light or a dark page."""
    pairs = canvas.DARK.items() if dark else zip(canvas.DARK, canvas.DARK, strict=True)
    return "".join(f"--{name[1:]}:{colour};" for name, colour in pairs)


def size(count: float) -> str:
    """Bytes for people, such as "2.3 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:  # from there three digits are 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def calibration(record: Mapping[str, Any]) -> str:
    """What a model was calibrated on, in a line; empty without."""
    if not (used := record.get("calibration")):
        return ""
    texts = [f"{of['name']} {of['sequences']}" for of in used["files"]]
    texts += [f"its own text {used['self']}"] if used.get("self") else []
    # Pictures, sound and arrays have no length in tokens.
    length = f" (sequences of {used['length']} tokens)" if used["length"] else ""
    return f"{', '.join(texts)}{length}"


def duration(seconds: float) -> str:
    """Seconds for people, such as "90.0 s" or "2.5 h"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perplexity(value: float | None) -> str:
    """A perplexity in four digits; None is one that is not finite."""
    if value is None:
        return "not finite"
    return f"{value:.4g}" if value < 9999.5 else f"{value:,.0f}"


def bits(value: float | None) -> str:
    """Bits per byte in four places; None is one that is not finite."""
    return "not finite" if value is None else f"{value:.4f}"


def perplexity_change(record: Mapping[str, Any]) -> str:
    """How the perplexity of the first text changed, as a clause; empty without any.

    A model that is worse than guessing by frequency has nothing to lose, so that its
    change says nothing: the clause says that it is such a one.

    Args:
      record: content of jaxprune.json.

    Returns:
      The clause.
    """
    for name, text in (record.get("perplexity") or {}).items():
        stages = measured(record)[0], measured(record)[-1]
        if "vocabulary" in record:  # the stages have other tokens
            before, after = (bits(text[stage]["bits_per_byte"]) for stage in stages)
            return f"{name} went from {before} to {after} bits per byte"
        before, after = (text[stage]["perplexity"] for stage in stages)
        change = (
            f"perplexity on {name} went from {perplexity(before)} to "
            f"{perplexity(after)}"
        )
        guessed = text["by_frequency"]
        worse = [value is None or value >= guessed for value in (before, after)]
        if not any(worse):
            return change
        which = "both" if all(worse) else "the latter" if worse[1] else "the former"
        return (
            f"{change}, {which} worse than guessing by frequency "
            f"({perplexity(guessed)})"
        )
    return ""
