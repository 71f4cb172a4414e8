"""The report of an experiment whose results are tables: a CSV, figures and one page.

An experiment says what its rows, tables and figures are; this writes all of them, or
none, and looks like the reports of the other experiments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from experiments.report import provenance
from experiments.report import results as results_
from jaxprune.files import atomic
from jaxprune.lm.report import canvas


class Table(NamedTuple):
    """A table of texts.

    Attributes:
      header: the columns' names.
      rows: a text for each column.
      caption: what the table is of.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


class Drawing(NamedTuple):
    """A figure that is drawn when a report is written.

    Attributes:
      draw: makes it.
      caption: what it shows.
    """

    draw: Callable[[], Figure]
    caption: str


class Report(NamedTuple):
    """What is shown of an experiment.

    Attributes:
      lead: a sentence: what the numbers are.
      facts: the few that everything else is held against, by name.
      tables: tables of means over seeds.
      columns: names of the columns of results.csv.
      rows: rows of results.csv, one a cell.
      figures: drawings by the name of the file.
    """

    lead: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    columns: Sequence[str]
    rows: Iterable[Mapping[str, Any]]
    figures: Mapping[str, Drawing]


def write(results: Mapping[str, Any], out: Path, report: Report) -> str:
    """Writes results.csv, the figures as SVG, and report.html.

    Args:
      results: results that `experiments.harness.runner.run` makes.
      out: directory of the files.
      report: tables, rows and figures to show of them.

    Returns:
      The tables as plain text, and where the page is.

    Raises:
      OSError: a file cannot be written; no file is ever left half written.
    """
    drawings = report.figures
    # Before the first file: a figure that fails leaves no half of a report.
    drawn = {name: drawing.draw() for name, drawing in drawings.items()}
    page = provenance.TEMPLATES.get_template("tables.html").render(
        title=f"{results['name']}: {report.lead}",
        name=results["name"],
        lead=report.lead,
        facts={**report.facts, "device": results["device"]},
        tables=report.tables,
        figures={
            name: {"drawn": drawn[name], "caption": drawing.caption}
            for name, drawing in drawings.items()
        },
        provenance=provenance.describe(results),
    )
    files = {"results.csv": results_.table_csv(report.columns, report.rows)}
    for name, figure in drawn.items():
        files[f"{name}.svg"] = canvas.svg(figure, ground="white").encode()
    atomic.replace_files(out, files | {"report.html": page.encode()})
    facts = [f"{name}: {value}" for name, value in report.facts.items()]
    return "\n".join([*facts, "", text(report.tables), f"\nreport: {out}/report.html"])


def text(tables: Sequence[Table]) -> str:
    """Tables as plain text, captions above."""
    return "\n\n".join(
        f"{table.caption}\n{_aligned(table.header, table.rows)}" for table in tables
    )


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of plain text, as wide as their widest cell."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
