"""Pictures with questions that only the picture answers: no network needed.

Two handwritten digits, in two colours, on a piece of a photograph, and one question
about them. Both come with scikit-learn: `load_digits` is the test set of the UCI
"Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, CC BY 4.0), the
photographs are "china.jpg" and "flower.jpg" (CC BY). Every sixth digit and two bands
across each photograph are for validation only. The digits to train on are slanted,
turned and stretched a little, each time in another way.
"""

import hashlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from experiments.datasets.tfds_builder import describe

# SHA-256 over the digits, their labels and the two photographs.
CHECKSUM = "7d75dbd239d5498804d5a98dc8354b8781f22d04e0123f7dee2391a27049657b"
SIZES = {"train": 24_000, "validation": 1000}
HEIGHT, WIDTH = 28, 56
COLOURS = {
    "red": (235, 60, 50),
    "green": (70, 220, 90),
    "blue": (90, 130, 255),
    "yellow": (250, 230, 70),
    "white": (255, 255, 255),
    "pink": (250, 120, 220),
}
DIGITS = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
PHOTOGRAPHS = {"china.jpg": "temple", "flower.jpg": "flower"}
_EVERY = 6  # digits; the last of them is for validation
_STROKE = 24  # pixels of a digit's side
_BAND = 30  # pixels of a band's height
_BANDS = {"train": (0, 1, 3, 4, 6), "validation": (2, 5)}
_DISTORTED = {"train": 15, "validation": 0}
_DIMMED = 0.6  # brightness of the photographs


class Source(NamedTuple):
    """What pictures are made of.

    Attributes:
      digits: (count, 8, 8), 0 to 1.
      labels: (count,), 0 to 9.
      photographs: the bands of each of the two, (height, width, 3) uint8.
      distorted: a digit's axes are changed by at most so many percent.
    """

    digits: np.ndarray
    labels: np.ndarray
    photographs: list[list[np.ndarray]]
    distorted: int = 0


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits `train` and `validation`: `picture`, `question`, `answer`."""

    name = "picture_questions"
    VERSION = tfds.core.Version("3.0.0")
    RELEASE_NOTES = {  # noqa: RUF012 (TFDS)
        "1.0.0": "Digits on photographs.",
        "2.0.0": "Darker photographs, and questions with answers of several words.",
        "3.0.0": "Held out from all over; distorted digits, brighter photographs.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        return describe(
            self,
            "Two handwritten digits on a photograph, and a question about them.",
            "https://scikit-learn.org/stable/datasets.html",
            {
                "picture": tfds.features.Image(shape=(HEIGHT, WIDTH, 3)),
                "question": tfds.features.Text(),
                "answer": tfds.features.Text(),
            },
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        source = read_source()
        return {
            split: self._generate_examples(parts(source)[split], split)
            for split in SIZES
        }

    def _generate_examples(
        self, source: Source, split: str
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(SIZES[split]):
            picture, question, answer = example(source, index)
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            yield (
                index,
                {"picture": png.getvalue(), "question": question, "answer": answer},
            )


def read_source() -> Source:
    """The digits and photographs of the installed scikit-learn.

    Raises:
      ValueError: if they are not those that were recorded.
    """
    from sklearn import datasets

    digits, labels = datasets.load_digits(return_X_y=True)
    photographs = [datasets.load_sample_image(name) for name in PHOTOGRAPHS]
    digest = hashlib.sha256()
    for array in (digits.astype(np.uint8), labels.astype(np.uint8), *photographs):
        digest.update(np.ascontiguousarray(array).tobytes())
    if digest.hexdigest() != CHECKSUM:
        raise ValueError(
            "picture_questions must be made of the digits and photographs that were "
            f"recorded (SHA-256 {CHECKSUM}), got {digest.hexdigest()}; install another "
            "release of scikit-learn"
        )
    return Source(digits.reshape(-1, 8, 8) / 16, labels, [[p] for p in photographs])


def parts(source: Source) -> dict[str, Source]:
    """What each split is made of; no digit and no pixel is in both."""
    # Half the size, so that a band shows more of the scene.
    small = [np.asarray(Image.fromarray(p).reduce(2)) for (p,) in source.photographs]
    # From all over the file, not from its end.
    held_out = np.arange(len(source.labels)) % _EVERY == _EVERY - 1
    digits = {"train": ~held_out, "validation": held_out}
    return {
        split: Source(
            source.digits[mask],
            source.labels[mask],
            [[p[_BAND * i : _BAND * (i + 1)] for i in _BANDS[split]] for p in small],
            _DISTORTED[split],
        )
        for split, mask in digits.items()
    }


def example(source: Source, index: int) -> tuple[np.ndarray, str, str]:
    """A picture with its question and answer, a pure function of the index.

    The picture is (28, 56, 3) uint8; the answer has one to five words.
    """
    # Keyed by the index and the split's number of digits: two splits draw differently.
    philox = np.random.Philox(key=np.array([index, len(source.labels)], np.uint64))
    words = iter(philox.random_raw(32).tolist())  # more than a picture draws

    def below(count: int) -> int:
        return int(next(words) % count)

    photo = below(len(PHOTOGRAPHS))
    photograph = source.photographs[photo][below(len(source.photographs[photo]))]
    row = below(photograph.shape[0] - HEIGHT)
    column = below(photograph.shape[1] - WIDTH)
    picture = _DIMMED * photograph[row : row + HEIGHT, column : column + WIDTH].astype(
        float
    )
    descriptions = {}
    for side, start in (("left", 0), ("right", WIDTH // 2)):
        digit, colour = below(len(source.labels)), below(len(COLOURS))
        down, across = (below(HEIGHT - _STROKE) for _ in range(2))
        name, ink = list(COLOURS.items())[colour]
        across += start
        area = (slice(down, down + _STROKE), slice(across, across + _STROKE))
        most = source.distorted
        change = [below(2 * most + 1) - most for _ in range(4)]
        opaque = _stroke(source.digits[digit], change)[..., None]  # (24, 24, 1)
        # Ink over the photograph, by how opaque it is at each pixel.
        picture[area] = opaque * np.array(ink) + (1 - opaque) * picture[area]
        descriptions[side] = f"{name} {DIGITS[source.labels[digit]]}"
    behind = list(PHOTOGRAPHS.values())[photo]
    questions = [
        *(
            (f"what is on the {side} ?", answer)
            for side, answer in descriptions.items()
        ),
        ("what is behind them ?", behind),
        ("what do you see ?", " ".join([*descriptions.values(), behind])),
    ]
    question, answer = questions[below(len(questions))]
    return picture.round().astype(np.uint8), question, answer


def _stroke(digit: np.ndarray, change: list[int]) -> np.ndarray:
    """How opaque the ink is, (24, 24), 0 to 1.

    `change` has the percents that are added to the map from the picture's axes to the
    digit's, row by row; the centre stays.
    """
    image = Image.fromarray(digit.astype(np.float32))
    # PIL wants the map from a pixel of the result to one of the source.
    a, b, c, d = (np.eye(2).ravel() + np.array(change) / 100) * image.width / _STROKE
    centre, half = image.width / 2, _STROKE / 2
    rows = (a, b, centre - half * (a + b), c, d, centre - half * (c + d))
    large = image.transform(
        (_STROKE, _STROKE), Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC
    )
    return np.asarray(large).clip(0, 1)


def vocabulary() -> list[str]:
    """Every word of the questions and answers, in order."""
    words = ("what", "is", "on", "the", "left", "right", "behind", "them", "do", "you")
    return [*words, "see", "?", *DIGITS, *COLOURS, *PHOTOGRAPHS.values()]
