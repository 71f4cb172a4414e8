"""Pictures as Phi-3-vision sees them: resized, cut into crops, and where each lands.

All of it is NumPy and Pillow on the host, as in the published processor, whose numbers
it gives. A picture becomes a global view and h x w crops; a prompt names pictures by
"<|image_1|>" and so on, and each name becomes as many tokens -1, -2, ... as the picture
has.

Reference:
  Keys: Cubic convolution interpolation for digital image processing, 1981, here with
  a = -3/4.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

try:
    from PIL import Image
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "experiments.phi3_vision.preprocess needs the package pillow, which is "
        "not installed; pip install '.[vision]'",
        name="PIL",
    ) from error

from experiments.phi3_vision.model import Phi3VisionConfig

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
"""CLIP's mean of each channel."""
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
"""CLIP's standard deviation of each channel."""
_PLACE = re.compile(r"<\|image_(\d+)\|>")


class Picture(NamedTuple):
    """A picture, ready for the tower.

    Attributes:
      pixels: the global view, then the crops row by row, (1 + rows * columns, size,
        size, 3) float32.
      rows: crops from top to bottom.
      columns: crops from left to right.
    """

    pixels: np.ndarray
    rows: int
    columns: int


class Prompt(NamedTuple):
    """A prompt with pictures.

    Attributes:
      tokens: int32 (time,), -i where picture i is.
      sources: int32 (time,), the row of `Phi3Vision.image_tokens` there, else -1.
      pixels: views and crops of all pictures, (crops, size, size, 3) float32.
    """

    tokens: np.ndarray
    sources: np.ndarray
    pixels: np.ndarray


def picture(image: Image.Image, *, size: int = 336, crops: int = 16) -> Picture:
    """Resizes and cuts a picture.

    A landscape picture, of ratio = width / height, gets s columns of crops: the largest
    s with s * ceil(s / ratio) <= crops. White is added above and below it. A portrait
    picture is treated as its transpose.

    Args:
      image: picture of any mode and size; it is taken as RGB.
      size: height and width of a crop.
      crops: greatest number of crops.

    Returns:
      The picture.

    Raises:
      ValueError: the picture is so long that its short side would vanish.

    Example:
      >>> seen = picture(Image.new("RGB", (640, 480)), size=8, crops=4)
      >>> seen.pixels.shape, seen.rows, seen.columns
      ((5, 8, 8, 3), 2, 2)
    """
    # (rows * size, columns * size, 3), normalised
    canvas = _normalised(_resized(image.convert("RGB"), size, crops))
    rows, columns = canvas.shape[0] // size, canvas.shape[1] // size
    crops_of_picture = canvas.reshape(rows, size, columns, size, 3).transpose(
        0, 2, 1, 3, 4
    )
    # cut is (rows, columns, size, size, 3), the global view (size, size, 3).
    view = bicubic(canvas, size)
    pixels = np.concatenate([view[None], crops_of_picture.reshape(-1, size, size, 3)])
    return Picture(pixels, rows, columns)


def _resized(image: Image.Image, size: int, crops: int) -> Image.Image:
    """The picture in whole crops, its long side along the longer row of them."""
    upright = image.width < image.height
    width, height = _fitting(image.width, image.height, size, crops)
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    padded = -(-height // size) * size
    canvas = Image.new("RGB", (width, padded), (255, 255, 255))
    canvas.paste(image, (0, (padded - height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas


def _fitting(width: int, height: int, size: int, crops: int) -> tuple[int, int]:
    """The longer and the shorter side of a picture, as large as the crops allow."""
    ratio = max(width, height) / min(width, height)
    scale = 1
    while scale * math.ceil(scale / ratio) <= crops:
        scale += 1
    longer = (scale - 1) * size
    shorter = int(longer / ratio)
    if shorter < 1:
        raise ValueError(
            f"a picture may be at most {longer} times as long as it is wide, got "
            f"{width} x {height}; cut it into parts"
        )
    return longer, shorter


def crops_of(
    width: int, height: int, *, size: int = 336, crops: int = 16
) -> tuple[int, int]:
    """How many crops a picture is cut into, without cutting it.

    Args:
      width: width of the picture, in pixels.
      height: height of the picture, in pixels.
      size: height and width of a crop.
      crops: greatest number of crops.

    Returns:
      Crops from top to bottom, and from left to right.

    Raises:
      ValueError: the picture is so long that its short side would vanish.

    Example:
      >>> crops_of(640, 480)
      (3, 4)
    """
    longer, shorter = _fitting(width, height, size, crops)  # pixels
    sides = (-(-shorter // size), longer // size)
    return sides[::-1] if width < height else sides


def _normalised(image: Image.Image) -> np.ndarray:
    return (np.asarray(image, np.float32) / np.float32(255) - MEAN) / DEVIATION


def bicubic(array: np.ndarray, size: int) -> np.ndarray:
    """Resizes to (size, size, channels) as torch does: cubic, no antialiasing."""
    vertical, horizontal = (_cubic(length, size) for length in array.shape[:2])
    return np.einsum(
        "ih,hwc,jw->ijc", vertical, array, horizontal, optimize=True
    ).astype("f4")


def _cubic(length: int, size: int) -> np.ndarray:
    """The weights (size, length) of a resize along one axis."""
    a = -0.75  # Keys's parameter, as torch has it
    # Where the centre of each new pixel lies among the old ones.
    centres = (np.arange(size) + 0.5) * (length / size) - 0.5
    first = np.floor(centres).astype(int)
    weights = np.zeros((size, length))
    for step in range(-1, 3):  # the four old pixels around it
        t = np.abs(centres - (first + step))
        # Keys's kernel for distances up to 1, and from 1 to 2.
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        index = np.clip(first + step, 0, length - 1)
        np.add.at(weights, (np.arange(size), index), np.where(t <= 1, near, far))
    return weights.astype(np.float32)


def token_layout(rows: int, columns: int, side: int, first: int) -> np.ndarray:
    """Which image token stands where.

    The crops as one picture, an end after each row of tokens; the separator; the
    global view, an end after each row.

    Args:
      rows: number of crops from top to bottom.
      columns: number of crops from left to right.
      side: number of tokens along each side of a crop.
      first: index of the global view among all views and crops of the batch.

    Returns:
      int32 rows of `Phi3Vision.image_tokens`.

    Example:
      >>> token_layout(1, 1, 1, 0).tolist()
      [3, 0, 1, 2, 0]
    """

    def numbers(crop: int, down: int, across: int) -> np.ndarray:
        # (down * across, side^2): the rows of these crops in `image_tokens`.
        index = np.arange(crop, crop + down * across)[:, None] * side**2
        index = 2 + index + np.arange(side**2)[None]
        index = index.reshape(down, across, side, side)
        index = index.transpose(0, 2, 1, 3)  # (down, side, across, side)
        index = index.reshape(down * side, across * side)  # as they lie in the picture
        return np.pad(index, ((0, 0), (0, 1))).ravel()  # 0: the end of a row

    rows_of_tokens = [
        numbers(first + 1, rows, columns),
        np.ones(1, int),
        numbers(first, 1, 1),
    ]
    return np.concatenate(rows_of_tokens).astype(np.int32)


def prompt(
    text: str,
    images: Sequence[Image.Image],
    encode: Callable[[str], Sequence[int]],
    config: Phi3VisionConfig,
    *,
    bos: int | None = None,
) -> Prompt:
    """A prompt's tokens and its pictures.

    Args:
      text: text of the prompt, with "<|image_1|>" to "<|image_n|>" where the pictures
        are.
      images: pictures, the first of them <|image_1|>.
      encode: function of a text without pictures to tokens, without BOS.
      config: shape of the model.
      bos: token that begins each text between pictures, also an empty one, as the
        published processor's tokenizer does; or None.

    Returns:
      The prompt.

    Raises:
      ValueError: the text does not name the pictures, each at least once.
    """
    numbers = [int(number) for number in _PLACE.findall(text)]
    if set(numbers) != set(range(1, len(images) + 1)):
        raise ValueError(
            f"a prompt must name <|image_1|> to <|image_{len(images)}|> for its "
            f"{len(images)} pictures, but names {sorted(set(numbers))}"
        )
    size = config.tower.image
    pictures = [picture(image, size=size, crops=config.crops) for image in images]
    # The index of each global view.
    firsts = np.cumsum([0, *(len(cut.pixels) for cut in pictures)])
    tokens: list[list[int]] = []
    sources: list[np.ndarray] = []
    for i, part in enumerate(_PLACE.split(text)):
        if i % 2 == 0:
            begun = [] if bos is None else [bos]
            tokens.append([*begun, *(encode(part) if part else ())])
        else:
            cut = pictures[int(part) - 1]
            places = token_layout(
                cut.rows, cut.columns, config.side, firsts[int(part) - 1]
            )
            tokens.append([-int(part)] * len(places))  # one for each image token
            sources.append(places)
    # (time,), both
    ids = np.concatenate([np.asarray(part, np.int32) for part in tokens])
    rows = np.full(ids.shape, -1, np.int32)
    if sources:
        rows[ids < 0] = np.concatenate(sources)
    none = np.zeros((0, size, size, 3), np.float32)
    return Prompt(ids, rows, np.concatenate([none, *(cut.pixels for cut in pictures)]))


def batch_prompts(prompts: Sequence[Prompt], side: int) -> Prompt:
    """Prompts of one length as a batch.

    Args:
      prompts: prompts, with pictures of their own or none.
      side: number of image tokens along a side of a view, `config.side`.

    Returns:
      Tokens and sources int32 (batch, time), the sources counting through the pixels
      of all prompts, which lie behind each other.

    Raises:
      ValueError: the prompts are not of one length.
    """
    lengths = {len(item.tokens) for item in prompts}
    if len(lengths) != 1:
        raise ValueError(
            f"prompts of one batch must be of one length, got {sorted(lengths)}; "
            "answer those of each length by themselves"
        )
    views = np.cumsum([0, *(len(item.pixels) for item in prompts)])
    # Rows 0 and 1 are the separators, of all.
    sources = [
        np.where(
            item.sources >= 2,
            item.sources + start * side**2,
            item.sources,
        )
        for item, start in zip(prompts, views, strict=False)
    ]
    return Prompt(
        np.stack([item.tokens for item in prompts]),
        np.stack(sources).astype(np.int32),
        np.concatenate([item.pixels for item in prompts]),
    )


def chat(question: str, images: int = 0) -> str:
    r"""A question in the form that the model was tuned on, pictures before it.

    Args:
      question: text of the question.
      images: number of pictures before it.

    Returns:
      The prompt; the answer follows.

    Example:
      >>> chat("What is it?", 1)
      '<|user|>\n<|image_1|>\nWhat is it?<|end|>\n<|assistant|>\n'
    """
    places = "".join(f"<|image_{i + 1}|>\n" for i in range(images))
    return f"<|user|>\n{places}{question}<|end|>\n<|assistant|>\n"
