"""What a job looks at: inputs that calibrate, inputs that measure, of one kind.

Files are texts, or arrays of the model's arguments (.npz, .safetensors), or a folder of
pictures or of sound.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from jaxprune.arrays.messages import listed
from jaxprune.lm.corpora import text_files
from jaxprune.lm.measure.tables import name_texts
from jaxprune.lm.steps.settings import CONTEXT, WINDOWS, Calibration
from jaxprune.lm.torch_models import array_samples, media_samples, text_samples
from jaxprune.lm.torch_models.opening import TorchModel
from jaxprune.lm.torch_models.samples import (
    JobInputs,
    Measured,
    Samples,
    digest_files,
    divide_samples,
    join_samples,
)
from jaxprune.lm.torch_models.text_samples import TextReader, text_reader
from jaxprune.torch.conversion import as_numpy

_HELD_OUT = "held out from calibration"
_NOT_SEEN = "not calibrated on"
_CALIBRATED = "calibrated on too"
_STEPS = 32  # tokens that a decoder writes to be calibrated on


class ReadFiles(NamedTuple):
    """Inputs that are no texts, as they lie in files.

    Attributes:
      samples: samples of each path.
      files: what jaxprune.json says of them.
    """

    samples: dict[Path, Samples]
    files: dict[Path, dict[str, Any]]


def check_input_files(paths: Sequence[Path]) -> None:
    """Refuses files that are not there or of several kinds, before a model is read.

    Args:
      paths: files and folders of inputs.

    Raises:
      ValueError: they are of other kinds, or of several.
      OSError: one is not there.
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"inputs must be files or folders, but there is no {listed(missing)}; give "
            "paths on this machine, data sets are not downloaded"
        )
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError(
            f"inputs must be of one kind, but there are {listed(sorted(kinds))}; give "
            "texts, or .npz and .safetensors of the model's arguments, or folders of "
            "pictures or of wav files"
        )
    if paths and _kind(paths[0]) == "texts":
        text_files.check_text_files(paths)


def read_inputs(calibration: Calibration, model: TorchModel) -> JobInputs:
    """Reads what a job calibrates on, and what it measures the model on.

    Args:
      calibration: options of the inputs.
      model: directory and module.

    Returns:
      The inputs.

    Raises:
      ValueError: a file does not fit the model.
    """
    paths = (*calibration.files, *calibration.evaluate)
    # A shrinking by magnitude looks at nothing.
    if not paths:
        return JobInputs(None, {}, (), None, "")
    if _kind(paths[0]) == "texts":
        return _read_texts(calibration, text_reader(model, paths))
    read = _read_files(paths, model, calibration.sequences + WINDOWS)
    measured = {
        name: Measured(
            read.samples[path].take(slice(WINDOWS)), _role(calibration, path)
        )
        for name, path in _named(calibration.evaluate)
    }
    if not calibration.files:
        return JobInputs(None, measured, (), None, "")
    # Files of one call are one set of samples, from which some are held out.
    samples, held = divide_samples(
        join_samples([read.samples[path] for path in calibration.files]),
        sequences=calibration.sequences,
        batch=calibration.batch,
        seed=calibration.seed,
        held_out=0 if calibration.evaluate else WINDOWS,
    )
    if held is not None:
        name = ", ".join(name_texts(calibration.files))
        measured[name] = Measured(held, _HELD_OUT)
    files = [read.files[path] for path in calibration.files]
    return JobInputs(samples, measured, files, None, "as the files have them")


def read_measured(
    paths: Sequence[Path],
    model: TorchModel,
    *,
    context: int,
    limit: int | None,
    seed: int = 0,
) -> dict[str, Measured]:
    """Reads what a model is measured on, without calibrating.

    Args:
      paths: texts, arrays or folders.
      model: directory and module.
      context: tokens of a window of a text.
      limit: greatest number of samples of each; None takes all.
      seed: rng seed of the tokens that are hidden from a masked language model.

    Returns:
      Name of a file to what it measures.

    Raises:
      ValueError: a file does not fit the model.
    """
    limit = limit or 2**31  # all that there are
    if _kind(paths[0]) != "texts":
        read = _read_files(paths, model, 2 * limit)
        return {
            name: Measured(read.samples[path].take(slice(limit)), _NOT_SEEN)
            for name, path in _named(paths)
        }
    reader = text_reader(model, tuple(paths))
    context = reader.fitted(context, CONTEXT)
    return {
        name: reader.measured(_read_text(path, reader), _NOT_SEEN, context, limit, seed)
        for name, path in _named(paths)
    }


def _read_text(path: Path, reader: TextReader) -> text_files.AnyText:
    return text_files.read_text(path, reader.tokenizer, reader.vocab_size)


def _read_texts(calibration: Calibration, reader: TextReader) -> JobInputs:
    context = reader.fitted(CONTEXT, CONTEXT)
    length = reader.fitted(calibration.length, type(calibration).length)
    # A text in several roles is read once.
    texts = {
        path: _read_text(path, reader)
        for path in (*calibration.files, *calibration.evaluate)
    }
    drawn_from = [texts[path] for path in calibration.files]
    evaluated = [
        (name, texts[path], _role(calibration, path))
        for name, path in _named(calibration.evaluate)
    ]
    if not evaluated:
        most = WINDOWS * reader.body(context)
        drawn_from, evaluated = _without_ends(calibration.files, drawn_from, most)
    measured = {
        name: reader.measured(text, role, context, WINDOWS, calibration.seed)
        for name, text, role in evaluated
    }
    if not calibration.files:
        return JobInputs(None, measured, (), None, reader.special)
    rows = next(filter(None, map(text_samples.row_length, drawn_from)), None)
    drawn = text_files.draw_sequences(
        drawn_from,
        sequences=calibration.sequences,
        # Rows have their own length, which texts beside them then share.
        length=rows or reader.body(length),
        bos=None,
        seed=calibration.seed,
    )
    files = [
        {"name": text.path.name, "sha256": text.sha256, "sequences": count}
        for text, count in zip(drawn_from, drawn.counts, strict=True)
    ]
    parts = [
        reader.reads(text).sequences(part, whole=rows is not None).arrays
        for text, part in zip(drawn_from, drawn.parts, strict=True)
    ]
    samples = Samples(
        {
            name: text_files.interleave([part[name] for part in parts])
            for name in parts[0]
        }
    )
    return JobInputs(samples, measured, files, rows or length, reader.special)


def _without_ends(
    paths: Sequence[Path], texts: Sequence[text_files.AnyText], most: int
) -> tuple[list[Any], list[tuple[str, Any, str]]]:
    """Texts without their ends, and the ends, which measure the model."""
    parts = [text_files.hold_out_end(text, most) for text in texts]
    ends = [
        (name, end, _HELD_OUT)
        for name, (_, end) in zip(name_texts(paths), parts, strict=True)
        if end is not None  # of rows and of very short texts there is none
    ]
    return [text for text, _ in parts], ends


def _read_files(paths: Sequence[Path], model: TorchModel, most: int) -> ReadFiles:
    """Reads arrays or folders; no more of a folder than is looked at."""
    samples: dict[Path, Samples] = {}
    files = {}
    for path in dict.fromkeys(paths):
        sources = [path]
        if path.is_dir():
            # (samples, channels, height, width) or (samples, values)
            samples[path], sources = media_samples.read_folder(path, model, most)
        else:
            samples[path] = array_samples.read_arrays(path)
        files[path] = {
            "name": path.name,
            "sha256": digest_files(sources),
            "sequences": samples[path].count,
        }
    return ReadFiles(_with_decoder(_in_dtype(samples, model), model), files)


def _in_dtype(samples: dict[Path, Samples], model: TorchModel) -> dict[Path, Samples]:
    """The samples with floats of the module's dtype, which torch does not convert."""
    dtype = as_numpy(torch.empty(0, dtype=model.module.dtype)).dtype

    def cast(array: np.ndarray) -> np.ndarray:
        is_floating = jnp.issubdtype(array.dtype, jnp.floating)
        return array.astype(dtype, copy=False) if is_floating else array

    return {
        path: Samples({name: cast(array) for name, array in part.arrays.items()})
        for path, part in samples.items()
    }


def _with_decoder(
    samples: dict[Path, Samples], model: TorchModel
) -> dict[Path, Samples]:
    """The samples of an encoder and a decoder with something for the decoder."""
    # Whoever gives .npz may have given the decoder's inputs too.
    names = {name for part in samples.values() for name in part.arrays}
    module = model.module
    main = module.main_input_name
    is_decoder = getattr(module.config, "is_encoder_decoder", False)
    if not is_decoder or main not in names or names & _DECODER_INPUTS:
        return samples
    return {
        path: media_samples.decoder_start(model, part, _STEPS)
        for path, part in samples.items()
    }


def _named(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    unique = tuple(dict.fromkeys(paths))  # one given twice is read once
    return list(zip(name_texts(unique), unique, strict=True))


def _role(calibration: Calibration, path: Path) -> str:
    return _CALIBRATED if path in calibration.files else _NOT_SEEN


def _kind(path: Path) -> str:
    # What a folder holds is looked at with the model, whose processor it is for.
    if path.is_dir():
        return "folders"
    return "arrays" if path.suffix in array_samples.SUFFIXES else "texts"


_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
