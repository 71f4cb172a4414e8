"""examples/digits.ipynb from docs/tutorials/digits.md: text and code, cell by cell.

`python docs/hooks/notebook.py` writes it. A block of text behind one of Python is the
output of its cell. The test suite runs the page's blocks and compares the two files.
"""

import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorials" / "digits.md"
NOTEBOOK = ROOT / "examples" / "digits.ipynb"
_CODE = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


def notebook(page: str) -> str:
    """The JSON of the notebook of a page of Markdown."""
    cells, end = [], 0
    for block in _CODE.finditer(page):
        cells += _text_cell(page[end : block.start()])
        cells.append(_code_cell(block["code"], block["output"]))
        end = block.end()
    cells += _text_cell(page[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    document = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _text_cell(text: str) -> list[dict]:
    # Links are the page's own, which lies in another folder.
    text = re.sub(r"(?<=\]\()(?!\w+:|#)[^)#\s]+", _from_the_notebook, text).strip()
    cell = {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}
    return [cell] if text else []


def _from_the_notebook(path: re.Match[str]) -> str:
    return posixpath.relpath(posixpath.join("docs/tutorials", path[0]), "examples")


def _code_cell(code: str, output: str | None) -> dict:
    stream = {"name": "stdout", "output_type": "stream", "text": _lines(output or "")}
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [stream] if output else [],
        "source": _lines(code.strip()),
    }


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook(PAGE.read_text()))
