"""Pictures as Phi-3-vision sees them: the torch processor's numbers, crops, places."""

import numpy as np
import pytest
from PIL import Image

from experiments.phi3_vision import preprocess

SHAPES = [
    (640, 480),
    (480, 640),
    (1000, 1000),
    (1920, 400),
    (50, 1600),
    (3000, 7),
    (336, 336),
    (37, 23),
    (1, 1),
]


def _photograph(width, height, mode="RGB"):
    """Smooth areas, edges and noise; reproducible."""
    rng = np.random.default_rng(width * 10000 + height)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([np.sin(x / 37), np.cos(y / 23), np.sin((x + y) / 51)], -1)
    array = 127 + 90 * smooth + rng.normal(0, 12, (height, width, 3))
    array[height // 3 : height // 2, width // 4 :] = [250, 10, 30]
    image = Image.fromarray(array.clip(0, 255).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.fromarray((x % 256).astype(np.uint8)))
        return image
    return image.convert(mode)


def _expected(image, size, crops):
    torch_phi3_vision = pytest.importorskip("tests.support.torch_phi3_vision")
    pixels, rows, columns = torch_phi3_vision.preprocess(image, size, crops)
    return pixels.numpy().transpose(0, 2, 3, 1), rows, columns


@pytest.mark.parity
@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_are_those_of_the_torch_processor(shape):
    image = _photograph(*shape)
    expected, rows, columns = _expected(image, 336, 16)
    got = preprocess.picture(image)
    assert (got.rows, got.columns) == (rows, columns)
    np.testing.assert_allclose(got.pixels, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_kind_of_picture_is_taken_as_rgb(mode):
    image = _photograph(200, 130, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    expected, *_ = _expected(image, 56, 6)
    got = preprocess.picture(image, size=56, crops=6)
    np.testing.assert_allclose(got.pixels, expected, rtol=0, atol=1e-4)


@pytest.mark.parity
def test_a_real_photograph_has_the_pixels_of_the_torch_processor():
    datasets = pytest.importorskip("sklearn.datasets")
    image = Image.fromarray(datasets.load_sample_image("china.jpg"))
    expected, rows, columns = _expected(image, 336, 16)
    got = preprocess.picture(image)
    assert (got.rows, got.columns) == (rows, columns) == (3, 4)
    np.testing.assert_allclose(got.pixels, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("crops", [1, 2, 4, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_there_are_no_more_crops_than_allowed_and_as_many_tokens_as_published(
    shape, crops
):
    image = _photograph(*shape)
    if max(shape) / min(shape) > 28 * crops:  # as long as all crops in a row
        with pytest.raises(ValueError, match="times as long"):
            preprocess.picture(image, size=28, crops=crops)
        return
    seen = preprocess.picture(image, size=28, crops=crops)
    assert preprocess.crops_of(*shape, size=28, crops=crops) == seen[1:]
    rows, columns = seen.rows, seen.columns
    assert 1 <= rows * columns <= crops
    assert seen.pixels.shape == (1 + rows * columns, 28, 28, 3)
    places = preprocess.token_layout(rows, columns, 12, 0)
    assert len(places) == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def test_one_square_crop_is_313_tokens_and_sixteen_are_2509():
    assert len(preprocess.token_layout(1, 1, 12, 0)) == 313
    assert len(preprocess.token_layout(4, 4, 12, 0)) == 2509


def test_each_token_of_each_crop_stands_once():
    places = preprocess.token_layout(2, 3, 2, 5)
    tokens = places[places > 1] - 2
    np.testing.assert_array_equal(np.sort(tokens), np.arange(5 * 4, 12 * 4))


def test_a_picture_that_would_vanish_is_refused():
    with pytest.raises(ValueError, match=r"times as long.*3000 x 1"):
        preprocess.picture(Image.new("RGB", (3000, 1)), size=28, crops=4)


def _encode(text):
    return [3 + ord(c) % 90 for c in text]


def _config(crops=4):
    from experiments.phi3_vision.checkpoint import vision_config
    from tests.support import torch_phi3_vision

    config = vision_config(torch_phi3_vision.CONFIG)
    return type(config)(
        decoder=config.decoder, tower=config.tower, skipped=1, crops=crops
    )


TEXTS = [
    "<|user|>\n<|image_1|>\nWhat?<|end|>\n",
    "<|image_1|><|image_2|>both",
    "<|image_2|> before <|image_1|>",
    "<|image_1|> and again <|image_1|>, then <|image_2|>",
]


@pytest.mark.parity
@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_has_the_tokens_of_the_processor(text):
    torch_phi3_vision = pytest.importorskip("tests.support.torch_phi3_vision")
    config = _config()
    images = [_photograph(90, 60), _photograph(40, 100)][: 1 + ("_2" in text)]
    shapes = [torch_phi3_vision.preprocess(image, 56, 4)[1:] for image in images]
    expected = torch_phi3_vision.tokens(
        text,
        shapes,
        lambda chunk: [1, *_encode(chunk)],
        lambda h, w: (h * w + 1) * 4 + 1 + (h + 1) * 2,
    )
    got = preprocess.prompt(text, images, _encode, config, bos=1)
    np.testing.assert_array_equal(got.tokens, expected)
    np.testing.assert_array_equal(got.sources >= 0, got.tokens < 0)
    assert len(got.pixels) == sum(1 + h * w for h, w in shapes)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("text", "count"),
    [("no picture", 1), ("<|image_2|>", 1), ("<|image_1|>", 0), ("<|image_1|>", 2)],
)
def test_a_prompt_that_does_not_name_its_pictures_is_refused(text, count):
    pytest.importorskip("tests.support.torch_phi3_vision")
    images = [_photograph(30, 30)] * count
    with pytest.raises(ValueError, match="must name"):
        preprocess.prompt(text, images, _encode, _config())


@pytest.mark.parity
def test_a_prompt_without_pictures_is_its_text():
    pytest.importorskip("tests.support.torch_phi3_vision")
    got = preprocess.prompt("text", [], _encode, _config(), bos=1)
    np.testing.assert_array_equal(got.tokens, [1, *_encode("text")])
    assert got.pixels.shape == (0, 56, 56, 3)
    assert (got.sources == -1).all()
