"""Records of what was measured: a TOML file and its tables in docs/results/records.

    python -m benchmarks.records
    python -m benchmarks.records --check

writes the index of all records into the pages of `PAGES`, between two marks; with
`--check` it only names the pages whose index is old, and exits with status 1. A table
is a CSV file beside its record; the files of docs/results itself have every run.
docs/hooks/links.py makes a page of the site of each record.
"""

import csv
import dataclasses
import itertools
import os
import sys
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "results" / "records"
_BEGIN = "<!-- made by python -m benchmarks.records -->"
_END = "<!-- end of what benchmarks.records made -->"

# Page to the sections whose records it lists, in that order.
PAGES = {
    "experiments/README.md": (
        "Pruned after training",
        "Pruned while it trains",
    ),
    "benchmarks/README.md": (
        "A trained model, beside torch",
        "What improves a solver",
        "Torch modules",
        "Criteria and allocations",
        "Time and memory",
        "Correctness",
    ),
}
# The titles of all records, without their questions and verdicts.
TITLES = "docs/results.md"


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file beside the record, its first row the head.

    Attributes:
      file: name of the file.
      caption: what its rows and numbers are, with units.
    """

    file: str
    caption: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement.

    Attributes:
      name: stem of its file.
      title: a few words.
      section: heading of the index, of `PAGES`.
      place: where it stands in its section, the lowest first.
      question: one sentence.
      verdict: one to three sentences without links, with what did not work.
      setup: what was done to which model, as far as the commands do not say it.
      device: machine and versions.
      seeds: what was repeated, and what a spread is.
      commands: shell lines, run from the checkout.
      runs: files of docs/results with every run.
      tables: its numbers.
    """

    name: str
    title: str
    section: str
    place: int
    question: str
    verdict: str
    setup: str = ""
    device: str = ""
    seeds: str = ""
    commands: Sequence[str] = ()
    runs: Sequence[str] = ()
    tables: Sequence[Table] = ()


def read(path: Path) -> Record:
    """The record of a file; one of an unknown field is refused."""
    fields: dict[str, Any] = tomllib.loads(path.read_text())
    tables = [Table(**table) for table in fields.pop("tables", ())]
    return Record(name=path.stem, tables=tables, **fields)


def records() -> list[Record]:
    """All records, by their places, then by name."""
    paths = FOLDER.glob("*.toml")
    return sorted(map(read, paths), key=lambda record: (record.place, record.name))


def _row(cells: Sequence[str]) -> str:
    # A bar ends a cell of Markdown.
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _csv_table(path: Path) -> str:
    """A CSV file as a table of Markdown."""
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return "\n".join(map(_row, [head, ["---"] * len(head), *rows]))


def page(record: Record) -> str:
    """The record as a page of Markdown, with links from its own folder."""
    parts = [f"# {record.title}", f"*{record.question}*", record.verdict, record.setup]
    parts += [
        f"**{label}**: {text}"
        for label, text in (("Machine", record.device), ("Repeated", record.seeds))
        if text
    ]
    if record.commands:
        parts.append("\n".join(["```sh", *record.commands, "```"]))
    for table in record.tables:
        parts.append(f"{table.caption} ([CSV]({table.file})):")
        parts.append(_csv_table(FOLDER / table.file))
    if record.runs:
        links = ", ".join(f"[{name}](../{name})" for name in record.runs)
        parts.append(f"Every run: {links}")
    parts.append(f"{record.section}: [all records](../../results.md)")
    # A field that is not given leaves no gap.
    return "\n\n".join(part for part in parts if part) + "\n"


def _item(record: Record, folder: str) -> str:
    """The record in the index: a link and its question; its page has the verdict."""
    text = f"- [{record.title}]({folder}/{record.name}.toml): {record.question}"
    # Links stay whole: a checkout shows the file as it stands.
    return textwrap.fill(
        " ".join(text.split()),
        120,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def index(page_path: str) -> str:
    """The index as it stands on a page: its sections, or the titles of all."""
    folder = os.path.relpath(FOLDER, (ROOT / page_path).parent)
    by_section: dict[str, list[Record]] = {}
    for record in records():
        by_section.setdefault(record.section, []).append(record)
    blocks = []
    if page_path == TITLES:
        # In the order of the pages, so that the three indexes agree.
        for section in itertools.chain.from_iterable(PAGES.values()):
            links = [
                f"[{record.title}]({folder}/{record.name}.toml)"
                for record in by_section[section]
            ]
            blocks.append(f"**{section}**: {', '.join(links)}.")
    else:
        for section in PAGES[page_path]:
            items = [_item(record, folder) for record in by_section[section]]
            blocks.append("\n".join([f"### {section}", "", *items]))
    return "\n\n".join(blocks)


def with_index(text: str, page_path: str) -> str:
    """The text of a page with the index between its marks.

    Raises:
      ValueError: the page has not both marks, in this order.
    """
    before, begin, old = text.partition(_BEGIN)
    _, end, after = old.partition(_END)
    if not (begin and end):
        raise ValueError(
            f"{page_path} needs the lines {_BEGIN!r} and {_END!r} around its index"
        )
    return f"{before}{begin}\n\n{index(page_path)}\n\n{end}{after}"


def old_pages() -> list[str]:
    """The pages whose index is not that of the records."""
    texts = {name: (ROOT / name).read_text() for name in (*PAGES, TITLES)}
    return [name for name, text in texts.items() if with_index(text, name) != text]


def main(arguments: Sequence[str]) -> int:
    """Writes or checks the index; returns the exit status."""
    old = old_pages()
    if "--check" in arguments:
        print(f"old: {', '.join(old)}; run python -m benchmarks.records" if old else "")
        return bool(old)
    for name in old:
        path = ROOT / name
        path.write_text(with_index(path.read_text(), name))
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
