"""One page and one CSV, of what an experiment says are its tables and figures.

The page loads nothing. Both files are made before the first one is written.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jaxprune.files import atomic
from jaxprune.lm.report import page


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


class Section(NamedTuple):
    """A part of the page.

    Attributes:
      title: its heading.
      tables: tables, below the figures.
      figures: figures by name, unique on the page.
      caption: what the figures show.
      samples: what models said: "label", "text" and, for some, "pictures".
    """

    title: str
    tables: Sequence[Table] = ()
    figures: Mapping[str, Figure] = {}
    caption: str = ""
    samples: Sequence[Mapping[str, Any]] = ()


class Report(NamedTuple):
    """All that is shown of an experiment.

    Attributes:
      lead: sentences; the first one is the most important.
      facts: numbers that everything else is compared with, by name.
      sections: parts of the page; the tables of the first one are printed too.
      rows: rows of results.csv.
    """

    lead: Sequence[str]
    facts: Mapping[str, str]
    sections: Sequence[Section]
    rows: Sequence[Mapping[str, Any]]


def write(results: Mapping[str, Any], out: Path, report: Report) -> str:
    """Writes results.csv and report.html.

    Args:
      results: content of results.json.
      out: directory of the files.
      report: what is shown of the results.

    Returns:
      The lead and the first tables as plain text, and where the page is.

    Raises:
      OSError: a file cannot be written; no file is left half written.
    """
    templates = page.templates(Path(__file__).with_name("templates"))
    html = templates.get_template("run.html").render(
        title=f"{results['name']}: {report.lead[0]}",
        name=results["name"],
        report=report,
        command=results["command"],
        made={
            "configuration": atomic.flat(results["config"]),
            "versions": results["versions"],
            "finished": {results["finished"]: results["device"]},
        },
    )
    stream = io.StringIO(newline="")
    columns = dict.fromkeys(name for row in report.rows for name in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(report.rows)
    files = {"results.csv": stream.getvalue(), "report.html": html}
    atomic.replace_files(out, {name: text.encode() for name, text in files.items()})
    tables = [text(table) for table in report.sections[0].tables]
    return "\n\n".join([*report.lead, *tables, f"report: {out / 'report.html'}"])


def text(table: Table) -> str:
    """A table as plain text, its columns as wide as their widest cell."""
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([table.caption, *aligned])


def percent(share: float) -> str:
    """A share for readers: "60 %", "97.5 %"."""
    return f"{100 * share:.4g}\N{NO-BREAK SPACE}%"


def mean(values: Any, *, signed: bool = False) -> str:
    """Mean and, of several seeds, standard deviation: "1.908 ± 0.008"; "-" of none."""
    values = np.ma.compressed(np.ma.masked_invalid(np.asarray(values, np.float64)))
    if not len(values):
        return "-"
    first = f"{values.mean():+z.3f}" if signed else f"{values.mean():.3f}"
    return first + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
