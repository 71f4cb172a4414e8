"""One run's results as a CSV, figures and one self-contained HTML page.

Everything is made from the results alone and made before the first file is written;
each file is written beside its place and renamed. Losses are validation losses in nats
per token. matplotlib is imported when `write_report` is called, not before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.report import results as results_

__all__ = [
    "accuracy",
    "figures",
    "findings",
    "life_cycle",
    "other_text",
    "plots",
    "provenance",
    "results",
    "sections",
    "tables",
    "write_report",
]


def write_report(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Writes results.csv, the figures as PNG and SVG, and report.html.

    Args:
      results: results of one run, the content of results.json.
      directory: directory of the files; made if absent, files there are replaced.

    Returns:
      The paths written: results.csv, each figure's .png and .svg, report.html.

    Raises:
      ValueError: results lack something, naming what, or are of another format.
      ImportError: matplotlib is not installed.
      OSError: a file cannot be written; no file is ever left half written.

    Example:
      results = json.loads((run / "results.json").read_text())
      write_report(results, run)
    """
    # Before matplotlib is imported, so that wrong results are refused at once.
    results_.check(results)
    try:
        from experiments.report import plots, sections
        from jaxprune.files import atomic
        from jaxprune.lm.report import canvas
    except ModuleNotFoundError as error:
        raise ImportError(
            f"write_report draws with matplotlib, and '{error.name}' is not installed; "
            "pip install '.[experiments]'"
        ) from error
    files = {
        "results.csv": results_.table_csv(
            results_.columns(results), results_.rows(results)
        )
    }
    for name, figure in sections.drawings(results).items():
        files[f"{name}.png"] = plots.png(figure)
        files[f"{name}.svg"] = canvas.svg(figure, ground="white").encode()
    files["report.html"] = sections.document(results).encode()
    return atomic.replace_files(directory, files)
