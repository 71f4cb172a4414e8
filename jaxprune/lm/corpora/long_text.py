"""A text that is too large to be tokenised whole; only the pieces that are drawn are.

Tokenising takes a hundred times the memory of a text. So the file is cut into places,
which are byte ranges of equal size, and only the places that a seed draws are read. A
piece of plain text begins at the first white space of its place. In `.jsonl` and
`.parquet` files a place holds the lines or rows that begin in it. Places do not
overlap, so pieces do not overlap either.
"""

import codecs
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxprune.lm.corpora.documents import Document, Rows, join_documents, parse_line
from jaxprune.lm.models.hf.tokenizer import Tokenizer

# Bytes that are tokenised at a time, and the smallest place.
_CHUNK, _SMALLEST = 2**18, 2**12
# Bytes of a place for each token that it must give, at first.
_PER_TOKEN = 8
_LONGEST_LINE = 2**26
_SPACES = b" \t\r\n"


@dataclasses.dataclass(frozen=True)
class LongText:
    """A file of text, of which only what is asked for is tokenised.

    Attributes:
      path: the file.
      sha256: of its bytes.
      tokenizer: the model's.
      vocab_size: the model's.
      stop: the byte before which it ends.
      rows: rows of `.parquet`, whose bytes are those of its decoded rows.
    """

    path: Path
    sha256: str
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    vocab_size: int
    stop: int
    rows: Rows | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def _has_documents(self) -> bool:
        return self.rows is not None or self.path.suffix == ".jsonl"

    def first(self, count: int | None = None) -> Int[np.ndarray, " tokens"]:
        """So many tokens from the beginning, if there are so many; None is all."""
        parts, count_so_far = [], 0
        for tokens in self._encoded(0):
            parts.append(tokens)
            count_so_far += tokens.size
            if count is not None and count_so_far >= count:
                break
        return np.concatenate([np.empty(0, np.int32), *parts])[:count]

    def without_end(
        self, share: int, most: int
    ) -> tuple["LongText", Int[np.ndarray, " tokens"]]:
        """The text without a part at its end, and that part's last tokens.

        The part is one in `share` of the bytes, but no more than should hold `most`
        tokens. At most `most` tokens are returned.
        """
        # Twice what should do, since texts differ in bytes a token.
        size = min(self.stop // share, max(2 * _PER_TOKEN * most, _CHUNK))
        tokens = np.concatenate([*self._encoded(self.stop - size)])
        return dataclasses.replace(self, stop=self.stop - size), tokens[-most:]

    def room(self, body: int, most: int) -> int:
        """How many pieces of so many tokens it has, counted up to `most`."""
        return self.first(most * body).size // body

    def drawn(
        self, count: int, body: int, chance: np.random.Generator
    ) -> Int[np.ndarray, "count body"] | None:
        """So many pieces that do not overlap; None where most of the text is needed."""
        width = max(_PER_TOKEN * body, _SMALLEST)
        while (places := self.stop // width) >= 2 * count:
            pieces: list[np.ndarray] = []
            # Places that turn out too short are passed over.
            for place in chance.permutation(places):
                piece = self._piece(int(place) * width, width, body)
                if piece is not None:
                    pieces.append(piece)
                if len(pieces) == count:
                    return np.stack(pieces)
            width *= 2  # too many places were too short
        return None

    def _piece(self, start: int, width: int, body: int) -> np.ndarray | None:
        """The first tokens of a place, or None where it has not so many."""
        end = min(start + width, self.stop)
        tokens = np.empty(0, np.int32)
        if self._has_documents:
            for document in self._documents(start, end):
                # Not all of a document that is far longer than what is needed.
                beginning = document.text[: 4 * _PER_TOKEN * body]
                before = document.before if tokens.size else ""
                tokens = np.concatenate([tokens, self._tokens(before + beginning)])
                if tokens.size >= body:
                    break
        else:
            content = self._read(start, end)
            if start:
                content = content[_boundary(content) :]
            # The last token may be that of a word that the end cuts, and the first the
            # space that some tokenizers put before any text.
            tokens = self._tokens(_decoded(content))[int(start > 0) : -1]
        return tokens[:body] if tokens.size >= body else None

    def _encoded(self, start: int) -> Iterator[np.ndarray]:
        """The tokens from a byte on, a part of the file at a time."""
        if self._has_documents:
            parts: list[Document] = []
            size, before = 0, ""
            for document in self._documents(start, self.stop):
                if size >= _CHUNK:
                    yield self._tokens(before + join_documents(parts))
                    parts, size, before = [], 0, document.before
                parts.append(document)
                size += len(document.text)
            yield self._tokens(before + join_documents(parts))
            return
        if start:
            start += _boundary(self._read(start, min(start + _CHUNK, self.stop)))
        while start < self.stop:
            content = self._read(start, min(start + _CHUNK, self.stop))
            if start + len(content) < self.stop:
                content = content[: _last_boundary(content)]
            yield self._tokens(_decoded(content))
            start += len(content)

    def _documents(self, start: int, end: int) -> Iterator[Document]:
        """The documents that begin between two bytes."""
        if self.rows is not None:
            yield from self.rows.documents(start, end, self.tokenizer)
            return
        with open(self.path, "rb") as file:
            if start:  # the line that the byte before belongs to is another place's
                file.seek(start - 1)
                _line(file, self.path)
            while (position := file.tell()) < end:
                line = _line(file, self.path)
                if position == 0:  # a mark of the byte order is no document
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    which = f"the one at byte {position}"
                    yield parse_line(line, self.path, which, self.tokenizer)

    def _read(self, start: int, end: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _tokens(self, text: str) -> np.ndarray:
        return encode_text(text, self.path, self.tokenizer, self.vocab_size)


def encode_text(
    text: str, path: Path, tokenizer: Tokenizer, vocab_size: int
) -> Int[np.ndarray, " tokens"]:
    """The tokens of a text, all of them the model's."""
    tokens = np.array(tokenizer.encode(text, bos=False), np.int32)
    highest = tokens.max() if tokens.size else -1
    if not highest < vocab_size:
        raise ValueError(
            "the tokenizer's tokens must be under the model's vocab_size "
            f"{vocab_size}, but '{path}' has {highest}; the tokenizer is another "
            "model's"
        )
    return tokens


def _decoded(content: bytes) -> str:
    """A part of a text, without cut characters and the mark of the byte order."""
    return content.decode("utf-8-sig", errors="ignore")


def _line(file: Any, path: Path) -> bytes:
    line: bytes = file.readline(_LONGEST_LINE)
    if not len(line) < _LONGEST_LINE:
        raise ValueError(
            f"a line of '{path}' must be under {_LONGEST_LINE} bytes, got a longer "
            "one; put each document on a line of its own"
        )
    return line


def _boundary(content: bytes) -> int:
    """Where the first word that is whole begins, or at least a character."""
    positions = [
        position for space in _SPACES if (position := content.find(space)) >= 0
    ]
    if positions:
        return min(positions)
    # No byte inside a character.
    return next((i for i, byte in enumerate(content) if byte & 0xC0 != 0x80), 0)


def _last_boundary(content: bytes) -> int:
    """Where the last white space begins, or at least the last character."""
    if (position := max(content.rfind(space) for space in _SPACES)) > 0:
        return position
    ends = (i for i in range(len(content) - 1, 0, -1) if content[i] & 0xC0 != 0x80)
    return next(ends, len(content))
