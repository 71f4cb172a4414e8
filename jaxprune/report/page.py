"""A self-contained HTML page: tables and inline figures that follow light and dark.

Nothing is loaded from elsewhere and no script runs. All text is escaped here, so that
callers pass plain text.
"""

import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxprune.report import canvas

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f5f6f8;--rule:#d9dde3;
--text:#1c2127;--quiet:#5b636d;--best:#e4f1e8;LIGHT}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1c2026;--rule:#343a42;
--text:#e7eaee;--quiet:#a0a8b2;--best:#1f3a2a;DARK}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:.95rem;font-weight:600;color:var(--quiet);margin:0 0 .75rem}
h2{font-size:1.3rem;line-height:1.3;margin:3rem 0 .4rem}
h3{font-size:1rem;margin:1.6rem 0 .2rem}
code{font:.93em ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
p{max-width:46rem;margin:.5rem 0}
.lead{max-width:56rem;font-size:clamp(1.2rem,4.5vw,1.55rem);line-height:1.35;font-weight:600;letter-spacing:-.01em;
text-wrap:pretty}
.note,figcaption{color:var(--quiet);font-size:.875rem;line-height:1.5}
figcaption{max-width:46rem}.note{margin:1.4rem 0 -.4rem}
figure{margin:1rem 0}
.panels{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}
.panels>svg{flex:1 1 340px;min-width:0;height:auto}
.wide{overflow-x:auto}.wide>svg{display:block;height:auto}
svg text{font-family:inherit!important}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .4rem;text-align:right;border-bottom:1px solid var(--rule);
white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{color:var(--quiet);font-weight:500}
tbody th{font-weight:600;position:sticky;left:0;background:var(--ground)}
td small{display:block;color:var(--quiet)}
td.best{background:var(--best);font-weight:700}td.best small{font-weight:400}
dl{display:flex;flex-wrap:wrap;gap:1px;background:var(--rule);
border:1px solid var(--rule);border-radius:8px;overflow:hidden;margin:1.6rem 0}
dl div{flex:1 1 9.5rem;box-sizing:border-box;background:var(--panel);
padding:.7rem .9rem}
dt{color:var(--quiet);font-size:.8rem}
dd{margin:0;font-weight:600;overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--rule);border-radius:8px;
margin:.4rem 0;padding:.8rem 1rem;font:13px/1.5 ui-monospace,Menlo,Consolas,
"DejaVu Sans Mono",monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:0 1.5rem}.pictures{display:grid;gap:.6rem;
grid-template-columns:repeat(auto-fill,minmax(9rem,1fr))}.asked{margin:0}
.asked img{width:100%;image-rendering:pixelated;border-radius:4px}
.texts pre{max-height:22rem;overflow-y:auto}
summary{cursor:pointer;color:var(--quiet);margin:.8rem 0}
"""


def table_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as a CSV with a header; None becomes an empty field."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def page(title: str, body: str) -> str:
    """A whole HTML page around `body`, with the style of every page here.

    Args:
      title: The title, as plain text.
      body: HTML.

    Returns:
      The page: UTF-8, nothing loaded from elsewhere.
    """
    style = _STYLE.replace("LIGHT", variables(dark=False))
    style = style.replace("DARK", variables(dark=True))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = ""
) -> str:
    """An HTML table that scrolls sideways where the page is narrow.

    Args:
      header: Column names, as plain text.
      rows: Cells: plain text, or HTML where it starts with "<td".
      caption: Plain text above.

    Returns:
      HTML.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = []
    for row in rows:
        cells = [
            cell if cell.startswith("<td") else f"<td>{html.escape(cell)}</td>"
            for cell in row[1:]
        ]
        lines.append(f"<tr><th>{html.escape(row[0])}</th>{''.join(cells)}</tr>")
    above = f'<p class="note">{html.escape(caption)}</p>' if caption else ""
    return (
        f'{above}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def picture(drawn: Mapping[str, Figure], caption: str, *, wide: bool = False) -> str:
    """Figures side by side, below each other where the page is narrow.

    Args:
      drawn: matplotlib figures by a name that is unique on the page.
      caption: Plain text below.
      wide: Whether each takes a line of its own and may scroll sideways.

    Returns:
      HTML with the figures inline.
    """
    shown = ""
    for name, figure in drawn.items():
        inches = figure.get_figwidth()
        size = f"max-width:{96 * inches:.0f}px"
        size += f";min-width:{70 * inches:.0f}px" if wide else ""
        opening = f'<svg role="img" aria-label="{html.escape(caption)}" style="{size}"'
        shown += inline(figure, name).replace("<svg", opening, 1)
    return (
        f'<figure><div class="{"wide" if wide else "panels"}">{shown}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def inline(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for HTML that follows the page's colours.

    Args:
      figure: Any figure of `figures`.
      name: A word that no other figure on the page has; put before every id.

    Returns:
      The element, without namespaces, its colours written as CSS variables (see
      `variables`).
    """
    text = canvas.svg(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", text, count=4)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour in canvas.DARK:
        text = text.replace(colour, f"var(--{colour[1:]})")
    return text


def variables(*, dark: bool) -> str:
    """The CSS variables that `inline` refers to, for a light or a dark page."""
    pairs = canvas.DARK.items() if dark else zip(canvas.DARK, canvas.DARK, strict=True)
    return "".join(f"--{name[1:]}:{colour};" for name, colour in pairs)
