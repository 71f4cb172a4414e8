"""Pictures with questions and answers: made here, in a directory, or from TFDS.

A directory has `train.jsonl` and `validation.jsonl`, an object a line,

    {"image": "cats/1.jpg", "question": "What is it?", "answer": "a cat"}

with the picture's path from the directory. Pictures are opened when a batch needs them.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.datasets.tfds_reader import examples

OWN = "picture_questions"
SPLITS = ("train", "validation")


class Asked(NamedTuple):
    """A picture, a question and its answer.

    Attributes:
      picture: (height, width, 3) uint8, or the file.
      question: what is asked.
      answer: what is right.
    """

    picture: np.ndarray | Path
    question: str
    answer: str

    @property
    def image(self) -> Image.Image:
        """The picture; a file is read anew each time."""
        if isinstance(self.picture, np.ndarray):
            return Image.fromarray(self.picture)
        with Image.open(self.picture) as image:
            image.load()
            return image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height; of a file only the header is read."""
        if isinstance(self.picture, np.ndarray):
            return self.picture.shape[1], self.picture.shape[0]
        with Image.open(self.picture) as image:
            return image.size


def load(
    data: str, *, data_dir: Path | None = None, fields: Sequence[str] = ()
) -> dict[str, Sequence[Asked]]:
    """Both splits of a data set, "train" and "validation".

    Args:
      data: "picture_questions", "tfds:NAME", or a directory.
      data_dir: directory of prepared data sets; TFDS's default if left out.
      fields: names of a TFDS data set's features: picture, question and answer.

    Raises:
      ValueError: a line, a feature or a picture is not what it must be.
      FileNotFoundError: there is no such directory, or a picture is missing.
    """
    if data != OWN and not data.startswith("tfds:"):
        return {split: _directory(Path(data), split) for split in SPLITS}
    name = data.removeprefix("tfds:")
    read = _of_tfds if data.startswith("tfds:") else examples
    names = tuple(fields) or ("picture", "question", "answer")
    return {
        split: [_asked(x, names, name) for x in read(name, split, data_dir)]
        for split in SPLITS
    }


def fingerprint(examples: Iterable[Asked]) -> str:
    """SHA-256 of questions, answers and pictures; of a file its name and size."""
    digest = hashlib.sha256()
    for example in examples:
        picture = example.picture
        if isinstance(picture, Path):
            # Name and size alone: reading every picture of a directory takes too long.
            digest.update(f"{picture.name} {picture.stat().st_size}\n".encode())
        else:
            digest.update(picture.tobytes())
        digest.update(f"{example.question}\n{example.answer}\n".encode())
    return digest.hexdigest()


def _asked(example: Mapping[str, Any], names: Sequence[str], data: str) -> Asked:
    if missing := [name for name in names if name not in example]:
        raise ValueError(
            f"examples of {data} must have the features {', '.join(names)}, but lack "
            f"{', '.join(missing)}; give --fields PICTURE QUESTION ANSWER of "
            f"{', '.join(example)}"
        )
    picture, question, answer = (example[name] for name in names)
    picture = np.asarray(picture)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = np.repeat(picture, 3, axis=2)  # grey as (height, width, 3)
    return Asked(picture, _text(question), _text(answer))


def _text(value: Any) -> str:
    """A text, or the first of several answers."""
    if isinstance(value, np.ndarray | list | tuple) and len(value):
        # VQA data sets have the answers of several people; the first is as good as any.
        value = value[0]
    return value.decode() if isinstance(value, bytes) else str(value)


def _of_tfds(name: str, split: str, data_dir: Path | None) -> list[Any]:
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return list(builder.as_data_source(split))


def _directory(directory: Path, split: str) -> list[Asked]:
    path = directory / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{path}' does not exist; --data must be {OWN}, tfds:NAME, or a directory "
            f"with {' and '.join(f'{name}.jsonl' for name in SPLITS)}"
        )
    questions = [
        _line(directory, f"'{path}', line {number}", line)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    if not questions:
        raise ValueError(f"'{path}' must have an example in each line, got none")
    return questions


def _line(directory: Path, place: str, line: str) -> Asked:
    """One example, its picture looked at but not read."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    names = ("image", "question", "answer")
    fine = isinstance(entry, dict) and all(isinstance(entry.get(n), str) for n in names)
    if not fine:
        raise ValueError(f"{place}: must be an object of texts {', '.join(names)}")
    question = Asked(directory / entry["image"], entry["question"], entry["answer"])
    try:
        # Reads the header alone: a picture that cannot be opened is named before
        # training.
        _ = question.size
    except FileNotFoundError:
        raise FileNotFoundError(f"{place}: there is no '{question.picture}'") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{place}: no picture that can be read ({error})") from None
    return question
