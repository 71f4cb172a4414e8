"""Pictures and sound as inputs: a folder of files, by the model's own processor.

The processor's files lie in the directory of the model. Of sound all samples have one
length, that of the shortest file up to ten seconds, and longer files give several.
"""

import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from jaxprune.arrays.messages import listed
from jaxprune.lm.torch_models.opening import TorchModel, load_reader
from jaxprune.lm.torch_models.samples import Samples, as_tensors

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SOUND = ".wav"
_AS_ARRAYS = "its inputs as .npz"
_SECONDS = 10  # of a sample of sound, at most
_SCALES = {1: 2**7, 2: 2**15, 4: 2**31}  # bytes of a PCM value to its full scale


def read_folder(path: Path, model: TorchModel, most: int) -> tuple[Samples, list[Path]]:
    """The inputs that a folder of pictures or of wav files makes.

    Args:
      path: the folder; sub-folders are not looked into.
      model: directory of the model, with its processor.
      most: greatest number of files that are read, by their names in order.

    Returns:
      The samples, and the files that they were made of.

    Raises:
      ValueError: it holds neither, or the directory has no processor for them.
    """
    files = sorted(file for file in path.iterdir() if file.is_file())
    sound = [file for file in files if file.suffix.lower() == SOUND]
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    if bool(sound) == bool(pictures):
        raise ValueError(
            f"a folder of inputs must hold either pictures ({listed(PICTURES)}) or "
            f".wav files, but '{path}' does not; give a folder of one of them, or the "
            "inputs as .npz"
        )
    if sound:
        return _sound_samples(sound[:most], model, most), sound[:most]
    return _picture_samples(pictures[:most], model), pictures[:most]


def _main_input(model: TorchModel, processed: Any) -> Samples:
    """What the model is called with: its main input, without masks of padding."""
    name = model.module.main_input_name
    if name not in processed:
        raise ValueError(
            f"the model takes {name}, but its processor makes {listed(processed)}; "
            f"give {_AS_ARRAYS}"
        )
    return Samples({name: np.asarray(processed[name])})


def _picture_samples(files: Sequence[Path], model: TorchModel) -> Samples:
    from PIL import Image

    loader = transformers.AutoImageProcessor
    processor = load_reader(loader, model, "a picture", "processor", _AS_ARRAYS)
    # Models of gray pictures say so in their configuration.
    gray = getattr(model.module.config, "num_channels", 3) == 1
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(image.convert("L" if gray else "RGB"))
    # That of timm's models makes no other tensors than torch's.
    return _main_input(model, processor(images=images, return_tensors="pt"))


def _sound_samples(files: Sequence[Path], model: TorchModel, most: int) -> Samples:
    loader = transformers.AutoFeatureExtractor
    extractor = load_reader(loader, model, "sound", "processor", _AS_ARRAYS)
    rate = extractor.sampling_rate  # values a second
    waves = [read_wave(file, rate) for file in files]
    # One program serves all samples, so all have one length.
    length = min(_SECONDS * rate, *(len(values) for values in waves))
    if not length:
        empty = [file.name for file, w in zip(files, waves, strict=True) if not len(w)]
        raise ValueError(
            f"files of sound must hold some, but {listed(empty)} are empty; take them "
            "out of the folder"
        )
    pieces = [
        values[start : start + length]
        for values in waves
        for start in range(0, len(values) - length + 1, length)
    ]
    processed = extractor(pieces[:most], sampling_rate=rate, return_tensors="np")
    return _main_input(model, processed)


def read_wave(path: Path, rate: int) -> np.ndarray:
    """A wav file of PCM as one channel.

    Args:
      path: the file.
      rate: values a second that the model takes.

    Returns:
      float32 (values,) in [-1, 1], the mean of its channels.

    Raises:
      ValueError: it is no PCM of 8, 16 or 32 bits, or has another rate.
    """
    try:
        with wave.open(str(path)) as file:
            width, channels = file.getsampwidth(), file.getnchannels()
            file_rate, frames = file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"'{path}' must be a wav file of PCM ({error})") from None
    if width not in _SCALES or file_rate != rate:
        raise ValueError(
            f"sound must be PCM of 8, 16 or 32 bits at the {rate} values a second that "
            f"the model takes, but '{path}' has {8 * width} bits at {file_rate}; "
            "convert it"
        )
    # 8 bits have no sign, and their zero is 128.
    dtype: Any = {1: np.uint8, 2: "<i2", 4: "<i4"}[width]
    values = np.frombuffer(frames, dtype).astype(np.float32)
    values -= np.float32(128 if width == 1 else 0)
    values /= np.float32(_SCALES[width])
    # (values, channels)
    mono: np.ndarray = values.reshape(-1, channels).mean(axis=1)
    return mono


def decoder_start(model: TorchModel, samples: Samples, steps: int) -> Samples:
    """The samples with what the decoder of the model writes itself, greedily.

    A decoder is calibrated on what it is given later, and that is its own text.

    Args:
      model: encoder and decoder.
      samples: inputs of the encoder.
      steps: tokens that the decoder writes.

    Returns:
      The samples with "decoder_input_ids".
    """
    import torch

    module, config = model.module, model.module.config
    start: Any = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError(
            f"the decoder of {model.class_name} needs a token to begin with, but "
            "config.json has no decoder_start_token_id; give decoder_input_ids beside "
            "its inputs, as .npz"
        )
    texts = []
    # Not `generate`, which stops a text at its end: all must be of one length.
    write: Callable[..., Any] = module
    with torch.no_grad():
        for batch in samples.batches(4):
            inputs = as_tensors(batch)
            # The encoder runs once, the decoder once a token.
            inputs |= {"encoder_outputs": module.get_encoder()(**inputs)}
            rows = len(next(iter(batch.values())))
            ids = torch.full((rows, 1), start, dtype=torch.int64)  # (batch, 1)
            for _ in range(steps - 1):
                logits = write(**inputs, decoder_input_ids=ids).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
            texts.append(ids.numpy())  # (batch, steps)
    return Samples({**samples.arrays, "decoder_input_ids": np.concatenate(texts)})
