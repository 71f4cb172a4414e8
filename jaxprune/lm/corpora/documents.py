"""Documents of a file: the lines of `.jsonl`, the rows of `.parquet`.

Each has a "text", or "messages" that the model's chat template writes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.lm.models.hf.tokenizer import Tokenizer

_FIELDS = ("text", "messages")
_ROWS = 256  # that are decoded at a time


class Document(NamedTuple):
    """A document.

    Attributes:
      text: text of the document, or of the conversation.
      before: text between the document before and this one.
    """

    text: str
    before: str


def join_documents(documents: Iterable[Document]) -> str:
    """One text of many documents."""
    parts = [
        part for document in documents for part in (document.before, document.text)
    ]
    return "".join(parts[1:])


def parse_line(
    line: str | bytes, path: Path, which: str, tokenizer: Tokenizer
) -> Document:
    """The document of a line of `.jsonl`.

    Args:
      line: text of the line, JSON.
      path: path of the file.
      which: number or place of the line, in words.
      tokenizer: tokenizer of the model.

    Returns:
      The document.

    Raises:
      ValueError: the line is no document, or the model cannot chat.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    document = None
    if isinstance(value, dict):
        document = _document(value, path, which, tokenizer)
    if document is None:
        shown = line if isinstance(line, str) else line.decode(errors="replace")
        shown = shown.strip()[:60]
        raise ValueError(
            f"each line of '{path}' must be a JSON object with a 'text', or with "
            f"'messages' that have a 'role' and a 'content', but {which} is not: "
            f"{shown!r}; mend it, or take it out"
        )
    return document


def _document(
    fields: Mapping[str, Any], path: Path, which: str, tokenizer: Tokenizer
) -> Document | None:
    if isinstance(text := fields.get("text"), str):
        return Document(text, "\n\n")
    messages = fields.get("messages")
    if not (isinstance(messages, list) and messages):
        return None
    if not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        return None
    if tokenizer.chat is None:
        raise ValueError(
            f"'{path}' holds conversations, but the model's directory has no chat "
            "template that can be read; give text, or the directory of the model that "
            "was made to chat"
        )
    try:
        text = tokenizer.chat.render(messages)
    except ValueError as error:
        raise ValueError(f"'{path}', {which}: {error}") from None
    if not tokenizer.begins:
        return Document(text, "")
    # Each sequence is begun with BOS, so the first conversation needs none.
    bos = tokenizer.chat.special.get("bos_token", "")
    return Document(text.removeprefix(bos), bos)


class Rows:
    """The rows of a `.parquet` file, of which only those asked for are decoded."""

    def __init__(self, path: Path) -> None:
        """Looks at the file's end, which says what is in it.

        Args:
          path: path of the file.

        Raises:
          ModuleNotFoundError: pyarrow is not installed.
          ValueError: it is no Parquet, or has neither column.
        """
        try:
            from pyarrow import (  # type: ignore[import-untyped]
                ArrowException,
                parquet,
            )
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"reading '{path}' needs the package pyarrow; pip install pyarrow"
            ) from None
        self.path = path
        try:
            self._file = parquet.ParquetFile(path, memory_map=True)
        except ArrowException as error:
            raise ValueError(f"'{path}' must be Parquet, but {error}") from None
        names = self._file.schema_arrow.names
        # "text" goes before "messages".
        columns = [name for name in _FIELDS if name in names]
        if not columns:
            raise ValueError(
                f"'{path}' must have a column 'text' or 'messages', got "
                f"{', '.join(names) or 'none'}"
            )
        self._column = columns[0]
        facts = self._file.metadata
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        self._begins = np.cumsum([0, *(group.num_rows for group in groups)])
        self.size = sum(
            group.column(j).total_uncompressed_size
            for group in groups
            for j in range(group.num_columns)
            if group.column(j).path_in_schema.split(".")[0] == self._column
        )

    def documents(
        self, start: int, end: int, tokenizer: Tokenizer
    ) -> Iterator[Document]:
        """The documents between two bytes, as if all rows had the same size.

        Args:
          start: first byte, below `size`.
          end: byte after the last.
          tokenizer: tokenizer of the model.

        Yields:
          Each document.

        Raises:
          ValueError: a row is no document, or the model cannot chat.
        """
        rows = int(self._begins[-1])  # of all groups
        # A byte stands for the row at the same share of the file.
        first, last = (-(-row * rows // max(self.size, 1)) for row in (start, end))
        for group in range(len(self._begins) - 1):
            row = int(self._begins[group])
            # Nothing of the group is asked for.
            if row >= last or self._begins[group + 1] <= first:
                continue
            for batch in self._file.iter_batches(_ROWS, [group], [self._column]):
                if row >= last:
                    break
                rows_here = batch.slice(max(first - row, 0), last - max(first, row))
                for i, value in enumerate(rows_here.column(0), max(first, row)):
                    yield self._document(value.as_py(), i, tokenizer)
                row += len(batch)

    def _document(self, value: Any, row: int, tokenizer: Tokenizer) -> Document:
        fields = {self._column: value}
        document = _document(fields, self.path, f"row {row}", tokenizer)
        if document is None:
            raise ValueError(
                f"each row of '{self.path}' must have a 'text', or 'messages' that "
                f"have a 'role' and a 'content', but row {row} has not"
            )
        return document
