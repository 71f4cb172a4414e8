"""Texts to sequences of tokens: which calibrate, and which are held out.

A text file is one stream of tokens. Sequences are pieces of it that do not overlap,
drawn by a seed, each begun with BOS where the model wants that. Of a text that is
calibrated on, the end is set aside before anything is drawn; it measures the model.
Text of more than 2 MiB and any `.parquet` become a `LongText`, which tokenises only the
parts that are drawn, unless most of the text is needed.
"""

import codecs
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int

from jaxprune.lm.corpora.documents import Rows, join_documents, parse_line
from jaxprune.lm.corpora.long_text import LongText, encode_text
from jaxprune.lm.models.hf.tokenizer import Tokenizer

HELD_OUT = 10
"""One in so many tokens of a calibration text is held out."""

_PLAIN, _LINES, _ROWS, _IDS = (".txt", ".md"), ".jsonl", ".parquet", ".npy"
# Bytes of text that are tokenised whole, and of any file that are looked at at a time.
_WHOLE, _CHUNK = 2**21, 2**24


class Text(NamedTuple):
    """A file as tokens.

    Attributes:
      path: the file.
      sha256: of its bytes.
      tokens: int32, (tokens,) of a text, (sequences, length) of `.npy`.
    """

    path: Path
    sha256: str
    tokens: Int[np.ndarray, "..."]

    @property
    def is_rows(self) -> bool:
        """Whether the file holds sequences that are used as they are."""
        return self.tokens.ndim == 2

    def first(self, count: int | None = None) -> Int[np.ndarray, " tokens"]:
        """So many tokens from the beginning, if there are so many; None is all."""
        return self.tokens[:count]

    def room(self, body: int, most: int) -> int:
        """How many pieces of so many tokens it has, or rows, counted up to `most`."""
        available = len(self.tokens) if self.is_rows else self.tokens.size // body
        return min(available, most)


AnyText: TypeAlias = Text | LongText
"""A file as tokens, or one that is tokenised where it is needed."""


def is_ids(path: Path) -> bool:
    """Whether a file holds token ids, and needs no tokenizer."""
    return path.suffix == _IDS


def check_text_files(paths: Sequence[Path]) -> None:
    """Refuses files that are not there or of another kind, all at once."""
    suffixes = (*_PLAIN, _LINES, _ROWS, _IDS)
    folders = ", ".join(str(path) for path in paths if path.is_dir())
    missing = ", ".join(str(path) for path in paths if not path.is_file())
    foreign = ", ".join(str(path) for path in paths if path.suffix not in suffixes)
    if folders:
        raise ValueError(
            f"texts must be files, but {folders} are folders; pictures and sound in "
            "folders are for models that go through torch, whose config.json names a "
            "class of transformers"
        )
    if missing:
        raise FileNotFoundError(
            f"texts must be files, but there is no {missing}; give paths of files on "
            "this machine, data sets are not downloaded"
        )
    if foreign:
        raise ValueError(
            f"texts must end in {', '.join(suffixes)}, got {foreign}; plain text is "
            ".txt, lines of JSON with a 'text' or 'messages' are .jsonl, rows of such "
            "a column are .parquet, token ids are .npy"
        )


def read_text(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> AnyText:
    """A file as tokens; all of it is hashed, and a long one tokenised when needed.

    Args:
      path: path of plain text in UTF-8 (.txt, .md); of .jsonl whose lines are objects
        with a "text", which are joined by blank lines, or with "messages", which the
        model's chat template writes; of .parquet with such a column; or of .npy of
        int32 (sequences, length).
      tokenizer: tokenizer of the model; not needed for .npy.
      vocab_size: number of the model's tokens.

    Returns:
      The tokens, without a BOS in front unless .npy holds it; between conversations a
      chat template may put one.

    Raises:
      ValueError: the file is not what its name says, or a token is not in the
        vocabulary.
      OSError: it cannot be read.
    """
    digest = _digest(path)
    if is_ids(path):
        return Text(path, digest, _ids(path, vocab_size))
    if tokenizer is None:
        raise ValueError(
            f"'{path}' is text, but the model has no tokenizer; give token ids as .npy"
        )
    if path.suffix == _ROWS:
        rows = Rows(path)
        return LongText(path, digest, tokenizer, vocab_size, rows.size, rows)
    if (size := path.stat().st_size) > _WHOLE:
        return LongText(path, digest, tokenizer, vocab_size, size)
    text = path.read_bytes().decode("utf-8-sig")  # without a mark of the byte order
    if path.suffix == _LINES:
        lines = enumerate(text.split("\n"), 1)  # a string may hold other separators
        text = join_documents(
            parse_line(line, path, f"line {i}", tokenizer)
            for i, line in lines
            if line.strip()
        )
    return Text(path, digest, encode_text(text, path, tokenizer, vocab_size))


def _digest(path: Path) -> str:
    """The SHA-256 of a file, which must be UTF-8 where it is text."""
    binary = path.suffix in (_ROWS, _IDS)
    # One pass for both.
    sink, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    size = path.stat().st_size
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            sink.update(part)
            try:
                if not binary:
                    decoder.decode(part, final=file.tell() == size)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"'{path}' must be UTF-8, but {error}; convert it"
                ) from None
    return sink.hexdigest()


def _ids(path: Path, vocab_size: int) -> Int[np.ndarray, "sequences length"]:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(
            f"'{path}' must be an array that numpy.save wrote, of token ids, but it is "
            "none, or one of objects; a text is to end in .txt"
        ) from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"'{path}' must be one array, got an archive of several")
    if not (tokens.ndim == 2 and np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(
            f"'{path}' must hold integers (sequences, length), got {tokens.dtype} of "
            f"shape {tokens.shape}"
        )
    if not (tokens.shape[1] >= 2 and len(tokens) > 0):
        raise ValueError(
            f"'{path}' must hold sequences of at least 2 tokens, got {tokens.shape}"
        )
    step = max(1, _CHUNK // tokens[0].nbytes)  # rows
    parts = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    low = min(int(part.min()) for part in parts)
    high = max(int(part.max()) for part in parts)
    highest = vocab_size - 1
    if not (low >= 0 and high <= highest):
        raise ValueError(
            f"tokens must be from 0 to {highest}, but '{path}' has {low} to {high}; it "
            "was made with another model's tokenizer"
        )
    return tokens


def hold_out_end(text: AnyText, most: int) -> tuple[AnyText, Text | None]:
    """A text split into what may be drawn from and an end that is held out."""
    if isinstance(text, LongText):
        begin, tokens = text.without_end(HELD_OUT, most)
        if tokens.size < 2:  # no document begins there
            return text, None
        return begin, Text(text.path, text.sha256, tokens)
    # The end has a tenth of the tokens, at most `most`; of .npy and of very short texts
    # there is none.
    end = 0 if text.is_rows else min(text.tokens.size // HELD_OUT, most)
    if end < 2:
        return text, None
    parts = text.tokens[:-end], text.tokens[-end:]
    return text._replace(tokens=parts[0]), text._replace(tokens=parts[1])


class Drawn(NamedTuple):
    """Sequences drawn from texts.

    Attributes:
      tokens: int32 (sequences, length).
      counts: number of sequences of each text.
      parts: sequences of each text, (count, length).
      undrawn: rows of each .npy that were not drawn; None where there are
        none, and for texts.
    """

    tokens: Int[np.ndarray, "sequences length"]
    counts: list[int]
    parts: list[Int[np.ndarray, "count length"]]
    undrawn: list[Text | None]


def draw_sequences(
    texts: Sequence[AnyText],
    *,
    sequences: int | Sequence[int],
    length: int,
    bos: int | None,
    seed: int,
    most: int | None = None,
) -> Drawn:
    """Draws sequences, as many from each text, without overlap.

    Args:
      texts: texts of the mixture.
      sequences: number of sequences in all, or of each text; of a number in all the
        first texts give one more where it must be.
      length: number of tokens of each, BOS included.
      bos: token that each sequence of a text begins with; rows of .npy are as they are.
      seed: rng seed that decides which; the order follows the texts' in turn.
      most: greatest number of rows that are handed on as undrawn; None is all.

    Returns:
      The sequences.

    Raises:
      ValueError: a text is too short, rows have another length, or there are more texts
        than sequences.

    Example:
      >>> text = Text(Path("a.txt"), "", np.arange(100, dtype=np.int32))
      >>> draw_sequences([text], sequences=4, length=8, bos=1, seed=0).tokens.shape
      (4, 8)
    """
    counts = shares(sequences, texts) if isinstance(sequences, int) else [*sequences]
    _check_enough(texts, counts, length, bos)
    parts, undrawn = [], []
    for i, (text, count) in enumerate(zip(texts, counts, strict=True)):
        chance = np.random.default_rng([seed, i])  # of each text apart from the others
        if isinstance(text, Text) and text.is_rows:
            tokens, remaining = _rows(text, count, most, chance)
        else:
            tokens, remaining = _pieces(text, count, length, bos, chance), None
        parts.append(tokens)
        undrawn.append(remaining)
    return Drawn(interleave(parts), counts, parts, undrawn)


def shares(sequences: int, texts: Sequence[AnyText]) -> list[int]:
    """The number of sequences of each text, of so many in all."""
    if not sequences >= len(texts):
        raise ValueError(
            f"each text gives at least one sequence, but {sequences} are asked of "
            f"{len(texts)} texts; ask for more sequences, or give fewer texts"
        )
    share, extra = divmod(sequences, len(texts))
    return [share + (i < extra) for i in range(len(texts))]


def interleave(
    parts: Sequence[Int[np.ndarray, "count length"]],
) -> Int[np.ndarray, "sequences length"]:
    """The sequences of several texts in turn, so that every batch sees every text."""
    # Of n sequences the i-th stands at (i + 1/2) / n of the whole.
    places = [(i + 0.5) / len(part) for part in parts for i in range(len(part))]
    return np.concatenate(parts)[np.argsort(places, kind="stable")]


def _check_enough(
    texts: Sequence[AnyText], counts: Sequence[int], length: int, bos: int | None
) -> None:
    body = length - (bos is not None)
    if not body >= 1:
        raise ValueError(
            f"a sequence needs a token beside BOS, got a length of {length}; give a "
            "greater one"
        )
    problems = []
    for text, count in zip(texts, counts, strict=True):
        if isinstance(text, LongText):  # looked at when it is drawn from
            continue
        if text.is_rows:
            rows, row_length = text.tokens.shape
            if row_length != length:
                raise ValueError(
                    f"'{text.path}' holds sequences of {row_length} tokens, but the "
                    f"length is {length}; give length {row_length}"
                )
            if rows < count:
                problems.append(f"'{text.path}' has {rows} sequences of {count}")
        elif text.tokens.size < count * body:
            problems.append(
                f"'{text.path}' has {text.tokens.size:,} tokens to draw from of "
                f"{count * body:,} ({count} sequences of {body})"
            )
    if problems:
        raise ValueError(
            f"the texts are too short: {'; '.join(problems)} needed; give more text, "
            "or fewer sequences, or a smaller length"
        )


def _rows(
    text: Text, count: int, most: int | None, chance: np.random.Generator
) -> tuple[Int[np.ndarray, "count length"], Text | None]:
    """The rows drawn from token ids, and those that are left."""
    chosen = np.sort(chance.choice(len(text.tokens), count, replace=False))
    others = np.delete(np.arange(len(text.tokens)), chosen)[:most]
    undrawn = text._replace(tokens=text.tokens[others]) if len(others) else None
    return text.tokens[chosen].astype(np.int32), undrawn


def _pieces(
    text: AnyText,
    count: int,
    length: int,
    bos: int | None,
    chance: np.random.Generator,
) -> Int[np.ndarray, "count length"]:
    """The sequences drawn from one text."""
    body = length - (bos is not None)
    tokens = text.drawn(count, body, chance) if isinstance(text, LongText) else None
    if tokens is None:
        if isinstance(text, LongText):
            text = Text(text.path, text.sha256, text.first())
            _check_enough([text], [count], length, bos)
        places = text.tokens.size // body
        # The pieces need not begin with the text.
        first = int(chance.integers(text.tokens.size - places * body + 1))
        chosen = chance.choice(places, count, replace=False)
        starts = first + body * chosen  # (count,)
        tokens = np.stack([text.tokens[start : start + body] for start in starts])
    if bos is not None:
        tokens = np.insert(tokens, 0, bos, axis=1)
    return tokens.astype(np.int32)
