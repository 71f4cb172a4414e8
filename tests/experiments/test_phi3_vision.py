"""Phi-3-vision: torch's numbers, cached decoding, its folders, its full size."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from experiments.phi3_vision import checkpoint, preprocess
from experiments.phi3_vision.answering import answer
from experiments.phi3_vision.checkpoint import vision_config
from experiments.phi3_vision.model import Phi3Vision
from jaxprune.lm.checkpoints.checkpoint_dir import Damaged, Unknown, open_directory
from jaxprune.lm.models import hf

torch = pytest.importorskip("torch")
torch_phi3_vision = pytest.importorskip("tests.support.torch_phi3_vision")

pytestmark = pytest.mark.parity

# First pictures of prompts that are shorter, and longer, than the 64 tokens at which
# the rotary angles change.
SHORT, LONG = (60, 50), (60, 140)
CROPS = {SHORT: 2, LONG: 6}


@pytest.fixture(scope="module")
def reference():
    return torch_phi3_vision.Reference()


@pytest.fixture(scope="module")
def loaded(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3v")
    torch_phi3_vision.save(folder, reference)
    return checkpoint.load(folder)


def _prompt(config, shape):
    rng = np.random.default_rng(0)
    sizes = [shape, (100, 30)]
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in sizes
    ]
    config = dataclasses.replace(config, crops=CROPS[shape])
    text = "ask <|image_1|> and <|image_2|> what they are"
    made = preprocess.prompt(text, images, _encode, config, bos=1)
    seen = [preprocess.picture(image, size=56, crops=config.crops) for image in images]
    theirs = [
        (torch.from_numpy(s.pixels.transpose(0, 3, 1, 2)), s.rows, s.columns)
        for s in seen
    ]
    return made, theirs


def _encode(text):
    return [3 + ord(c) % 90 for c in text]


def _arguments(prompt):
    return prompt.tokens[None], prompt.pixels, prompt.sources[None]


@functools.partial(jax.jit, static_argnames="graphdef")
def _call(graphdef, params, *prompt, **options):
    return nnx.merge(graphdef, params)(*prompt, **options)


def _run(model, *prompt, **options):
    """What the model gives; one program for each shape of one model."""
    return _call(*nnx.split(model, nnx.Param), *prompt, **options)


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_image_embeddings_are_those_of_torch(shape, reference, loaded):
    prompt, theirs = _prompt(loaded.config, shape)
    with torch.no_grad():
        expected = [reference.image_embeddings(*picture).numpy() for picture in theirs]
    rows = nnx.jit(Phi3Vision.image_tokens)(loaded.model, jnp.asarray(prompt.pixels))
    got = np.asarray(rows)[prompt.sources[prompt.sources >= 0]]
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shape", "longer"), [(SHORT, False), (LONG, True)])
def test_logits_are_those_of_torch(shape, longer, reference, loaded):
    prompt, theirs = _prompt(loaded.config, shape)
    assert (len(prompt.tokens) > 64) == longer
    ids = torch.from_numpy(prompt.tokens[None]).long()
    with torch.no_grad():
        expected = reference(ids, theirs).numpy()
    got = _run(loaded.model, *_arguments(prompt))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [pytest.param(SHORT, marks=pytest.mark.full), LONG])
def test_gradients_are_those_of_torch(shape, reference, loaded):
    prompt, theirs = _prompt(loaded.config, shape)
    ids = torch.from_numpy(prompt.tokens[None]).long()
    targets = ids[:, 1:].clamp_min(0)
    reference.zero_grad()
    logits = reference(ids, theirs)[:, :-1]
    torch.nn.functional.cross_entropy(logits[0], targets[0]).backward()
    graphdef, params = nnx.split(loaded.model, nnx.Param)

    def loss(params):
        logits = nnx.merge(graphdef, params)(*_arguments(prompt))[:, :-1]
        labels = jnp.maximum(prompt.tokens[None, 1:], 0)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(cross)

    got = dict(hf.to_tensors(loaded.names, jax.jit(jax.grad(loss))(params)))
    unused = 0
    for name, parameter in reference.published().items():
        if parameter.grad is None:
            unused += 1
            assert not got[name].any(), name
        else:
            expected = parameter.grad.numpy()
            np.testing.assert_allclose(got[name], expected, atol=1e-4, err_msg=name)
    # The tower's last layer and the norm after it: 16 + 2 tensors.
    assert unused == 18
    assert len(got) == len(reference.published())


@pytest.mark.parametrize("shape", [SHORT, LONG])
def test_cached_decoding_is_full_decoding(shape, loaded):
    prompt, _ = _prompt(loaded.config, shape)
    tokens, pixels, sources = _arguments(prompt)
    time = tokens.shape[1]
    expected = _run(loaded.model, tokens, pixels, sources)
    # Where the parameters lie: else the second call is another program.
    cache = jax.device_put(loaded.model.decoder.init_cache(1, time), jax.devices()[0])
    cut = time - 5
    first = (tokens[:, :cut], pixels, sources[:, :cut])
    logits, cache = _run(loaded.model, *first, cache=cache)
    parts = [logits]
    for i in range(cut, time):
        logits, cache = _run(loaded.model, tokens[:, i : i + 1], cache=cache)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [SHORT, pytest.param(LONG, marks=pytest.mark.full)])
def test_greedy_words_are_those_of_passes_over_everything(shape, loaded):
    prompt, _ = _prompt(loaded.config, shape)
    tokens, pixels, sources = _arguments(prompt)
    steps = 8  # the short prompt's words cross the rope's switch
    options = {"steps": steps, "key": jax.random.key(0), "temperature": 0}
    got = answer(loaded.model, tokens, pixels, sources, **options)
    assert got.shape == (1, tokens.shape[1] + steps)
    most = tokens.shape[1] + steps
    for _ in range(steps):
        time = tokens.shape[1]
        # Words after the last are not seen; up to 64 of them the rope is the same.
        rest = ((0, 0), (0, (64 if time <= 64 else most) - time))
        padded = (np.pad(tokens, rest), pixels, np.pad(sources, rest))
        logits = np.asarray(_run(loaded.model, *padded))
        word = logits[:, time - 1].argmax(-1)[:, None].astype(tokens.dtype)
        tokens = np.concatenate([tokens, word], axis=1)
        sources = np.concatenate([sources, np.full_like(word, -1)], axis=1)
    np.testing.assert_array_equal(got, tokens)


def test_a_batch_of_pictures_is_answered_as_each_alone(loaded):
    config, prompts = loaded.config, []
    for colour in ("teal", "red"):
        image = Image.new("RGB", SHORT, colour)
        text = preprocess.chat("what ?", 1)
        made = preprocess.prompt(text, [image], lambda s: [len(s), 7], config, bos=1)
        prompts.append(made)
    both = preprocess.batch_prompts(prompts, config.side)
    options = {"steps": 6, "key": jax.random.key(0), "temperature": 0}
    got = answer(loaded.model, both.tokens, both.pixels, both.sources, **options)
    logits = np.asarray(_run(loaded.model, both.tokens, both.pixels, both.sources))
    for i, each in enumerate(prompts):
        tokens, pixels, sources = _arguments(each)
        alone = np.asarray(_run(loaded.model, tokens, pixels, sources))
        np.testing.assert_allclose(logits[i], alone[0], rtol=0, atol=2e-5)
        written = answer(loaded.model, tokens, pixels, sources, **options)
        np.testing.assert_array_equal(np.asarray(got)[i], np.asarray(written)[0])
    stacked = np.stack([each.sources for each in prompts])
    assert (stacked != both.sources).any()
    with pytest.raises(ValueError, match="prompt tokens in"):  # pixels of one prompt
        answer(loaded.model, both.tokens, prompts[0].pixels, both.sources, **options)
    longer = preprocess.prompt("a", [], lambda s: [7], config, bos=1)
    with pytest.raises(ValueError, match="same shape"):
        preprocess.batch_prompts([prompts[0], longer], config.side)


def test_the_picture_matters(loaded):
    prompt, _ = _prompt(loaded.config, SHORT)
    tokens, pixels, sources = _arguments(prompt)
    one, other = (_run(loaded.model, tokens, x, sources) for x in (pixels, -pixels))
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 0.1


def test_pixels_without_sources_are_refused(loaded):
    with pytest.raises(ValueError, match="together"):
        loaded.model(np.zeros((1, 3), np.int32), np.zeros((1, 56, 56, 3), np.float32))


# ---- folders


def _save(folder, reference, **changes):
    torch_phi3_vision.save(folder, reference, **changes)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_goes_back_bit_for_bit(dtype, tmp_path):
    reference = torch_phi3_vision.Reference().to(dtype)
    loaded = checkpoint.load(_save(tmp_path, reference))
    assert loaded.config.dtype == str(dtype).removeprefix("torch.")
    directory = open_directory(tmp_path)
    got = dict(hf.to_tensors(loaded.names, nnx.state(loaded.model, nnx.Param)))
    assert got.keys() == directory.tensors.keys()
    for name, array in got.items():
        stored = directory.read(name)
        assert (array.dtype, array.shape) == (stored.dtype, stored.shape)
        assert array.tobytes() == np.ascontiguousarray(stored).tobytes()


def test_a_second_copy_of_the_embedding_is_kept_or_refused(reference, tmp_path):
    from safetensors.torch import load_file, save_file

    _save(tmp_path, reference)
    path, copy = tmp_path / "model.safetensors", "model.vision_embed_tokens.wte.weight"
    tensors = load_file(path)
    tensors[copy] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    loaded = checkpoint.load(tmp_path)
    got = dict(hf.to_tensors(loaded.names, nnx.state(loaded.model, nnx.Param)))
    np.testing.assert_array_equal(got[copy], got["model.embed_tokens.weight"])
    tensors[copy] += 1
    save_file(tensors, path)
    with pytest.raises(Damaged, match=r"wte.weight differs"):
        checkpoint.load(tmp_path)


def test_the_number_of_crops_is_read_with_the_processor(reference, tmp_path):
    _save(tmp_path, reference)
    assert checkpoint.load(tmp_path).config.crops == 16
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps({"num_crops": 4}))
    assert checkpoint.load(tmp_path).config.crops == 4
    settings.write_text(json.dumps({"num_crops": "many"}))
    with pytest.raises(Damaged, match="num_crops"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rotary": 3}, "rotary=3 is not known"),
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order"),
        ({"embd_layer": {"more": 1}}, "embd_layer.more=1 is not known"),
        ({"img_processor": {"name": "siglip"}}, "img_processor.name"),
        ({"img_processor": {"model_name": "other"}}, "img_processor.model_name"),
        ({"img_processor": {"layer_idx": 3}}, "img_processor.layer_idx"),
        ({"img_processor": {"type_feature": "cls"}}, "img_processor.type_feature"),
    ],
)
def test_what_the_configuration_says_and_nobody_knows_is_refused(
    changes, told, reference, tmp_path
):
    _save(tmp_path, reference, **changes)
    with pytest.raises(Unknown, match=told):
        checkpoint.load(tmp_path)


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="phi3_v, got 'phi3'"):
        vision_config({**torch_phi3_vision.CONFIG, "model_type": "phi3"})


def test_attributes_of_pictures_are_unknown_to_a_language_model(reference, tmp_path):
    _save(tmp_path, reference, model_type="phi3")
    with pytest.raises(Unknown, match=r"config.json.*phi3 config.*embd_layer=.*known"):
        hf.load(tmp_path)


def test_tensors_of_another_shape_are_refused(reference, tmp_path):
    processor = dict(torch_phi3_vision.CONFIG["img_processor"])
    processor["vision_config"] = {**processor["vision_config"], "num_hidden_layers": 3}
    _save(tmp_path, reference, img_processor=processor)
    with pytest.raises(Damaged, match=r"missing: .*encoder\.layers\.2"):
        checkpoint.load(tmp_path)


def test_a_new_model_is_written_by_the_published_names(reference, tmp_path):
    shapes = checkpoint.abstract(vision_config(torch_phi3_vision.CONFIG))
    graphdef, params = nnx.split(shapes, nnx.Param)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    model = nnx.merge(graphdef, zeros)
    tensors = dict(checkpoint.tensors(model))
    assert tensors.keys() == reference.published().keys()
    for name, parameter in reference.published().items():
        assert tensors[name].shape == tuple(parameter.shape), name
