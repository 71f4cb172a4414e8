"""A model's directory as one GGUF file, which llama.cpp runs.

The package `gguf` of llama.cpp writes the file and quantizes; what is here is the
mapping, for families whose graph in llama.cpp computes what ours does. One tensor is in
memory at a time. Vectors stay float32, matrices take the type that is asked for.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np

from jaxprune.files import atomic
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.export.gguf_shape import (
    Architecture,
    check_shape,
    rope_factors,
    write_shape,
)
from jaxprune.lm.export.gguf_tokenizer import write_tokenizer
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig

GGUFType: TypeAlias = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
"""Types of matrices; the last two are GGUF's blocks of 32 weights with one scale."""
_BLOCK = 32
_MAGIC = b"GGUF"


class GGUFResult(NamedTuple):
    """A file that was written.

    Attributes:
      file: path of the file.
      bytes: size of the file.
      tensors: number of tensors.
      types: GGUF's type to the number of weights that have it.
    """

    file: Path
    bytes: int
    tensors: int
    types: dict[str, int]


class _Tensor(NamedTuple):
    """A tensor of the file: GGUF's name, shape, type, and what reads it as float32."""

    name: str
    bytes: int  # in the directory
    shape: tuple[int, ...]
    type: str
    read: Callable[[], np.ndarray]


def export_gguf(
    source: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    type: GGUFType = "f16",
    ignore_config: Sequence[str] = (),
    overwrite: bool = False,
    progress: Callable[[str, int, int], Any] = lambda name, done, total: None,
) -> GGUFResult:
    """Writes a Llama, Gemma 3 or Qwen 3 as GGUF; a Llama of unequal layers as deci.

    A pruned model keeps its zeros, and a shrunk one its sizes. Of a quantized type the
    embedding and the head have 8 bits, as the logits suffer most there; a matrix whose
    rows are no whole blocks of 32 stays f16.

    Args:
      source: directory of the model, with a tokenizer.json.
      file: path of the file.
      type: type of matrices.
      ignore_config: attributes of config.json that are not looked at; see `hf.load`.
      overwrite: whether an earlier GGUF may be replaced.
      progress: function that is called after each tensor with its name, the bytes of
        the directory that are done, and all.

    Returns:
      What was written.

    Raises:
      ValueError: llama.cpp would compute something else; nothing was written.
      ModuleNotFoundError: the package gguf is missing.
      OSError: the file could not be written.
    """
    if type not in get_args(GGUFType):
        raise ValueError(
            f"type must be one of {', '.join(get_args(GGUFType))}, got {type!r}"
        )
    gguf = _package()
    loaded = hf.load(source, lazy=True, ignore_config=ignore_config)
    opened, config = open_directory(source), loaded.config
    architecture = check_shape(opened.config["model_type"], config)
    tokenizer = hf.load_tokenizer(source)  # refuses files that are not what they say
    content = json.loads((opened.path / "tokenizer.json").read_text(encoding="utf-8"))
    content.setdefault("added_tokens", [])
    place = atomic.apart(file, opened.path)
    replaceable = _why_not_gguf if overwrite else None
    with atomic.staged_file(place, replaceable=replaceable) as partial:
        writer = gguf.GGUFWriter(partial, architecture.name)
        writer.add_name(opened.path.name)
        write_shape(writer, architecture, config)
        write_tokenizer(writer, opened, content, tokenizer, config.vocab_size)
        writer.add_file_type(_file_type(gguf, type))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = list(_tensors(gguf, opened, loaded, architecture, type))
        _write_tensors(gguf, writer, tensors, opened.meter(progress))
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
    types: dict[str, int] = {}
    for tensor in tensors:
        types[tensor.type] = types.get(tensor.type, 0) + int(np.prod(tensor.shape))
    return GGUFResult(place, place.stat().st_size, len(tensors), types)


def _tensors(
    gguf: Any,
    opened: CheckpointDir,
    loaded: hf.Loaded,
    architecture: Architecture,
    type: GGUFType,
) -> Iterator[_Tensor]:
    """The tensors of the file, those of the rotary frequencies first."""
    config = loaded.config
    arch = gguf.MODEL_ARCH[architecture.name.upper()]
    names = gguf.get_tensor_name_map(arch, config.layers)
    ropes = [r for i in range(config.layers) if (r := config.rope(i)) is not None]
    factors = rope_factors(ropes[0])[1]
    if architecture.factors and len({*factors.tolist()}) > 1:
        yield _Tensor("rope_freqs.weight", 0, factors.shape, "F32", lambda: factors)
    for leaf, origin in loaded.names.items():
        info = opened.tensors[origin.name]
        # Directories of the bare model leave the prefix out.
        known = origin.name.startswith(("model.", "lm_head."))
        canonical = origin.name if known else f"model.{origin.name}"
        name = names.get_name(canonical, try_suffixes=(".weight", ".bias"))
        stored = _stored_type(type, leaf, info.shape)

        def read(leaf: str = leaf, tensor: str = origin.name) -> np.ndarray:
            return _converted(leaf, opened.read(tensor), architecture, config)

        yield _Tensor(name, info.size, info.shape, stored, read)


def _converted(
    leaf: str, tensor: np.ndarray, architecture: Architecture, config: DecoderConfig
) -> np.ndarray:
    """A tensor in float32 as llama.cpp's graph wants it."""
    tensor = np.ascontiguousarray(tensor, np.float32)
    if leaf.endswith("/scale"):
        return tensor + np.float32(architecture.plus_one)
    part = leaf.split("/")[-2]
    if architecture.permuted and part in ("q", "k"):
        heads = config.heads if part == "q" else config.kv_heads
        # Pairs of (heads, 2, pairs, ...) become neighbours: (heads, pairs, 2, ...).
        halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
    return tensor


def _stored_type(type: GGUFType, leaf: str, shape: Sequence[int]) -> str:
    """GGUF's type of a tensor."""
    if len(shape) == 1:
        return "F32"
    if type not in ("q8_0", "q4_0"):
        return type.upper()
    if shape[-1] % _BLOCK:
        return "F16"
    in_layer = leaf.startswith("layers/")
    return type.upper() if in_layer else "Q8_0"


def _write_tensors(
    gguf: Any,
    writer: Any,
    tensors: Sequence[_Tensor],
    advance: Callable[[str, int], Any],
) -> None:
    """Writes the header, then tensor after tensor."""
    for name, _, shape, stored, _ in tensors:
        quantization = gguf.GGMLQuantizationType[stored]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, quantization)
        size, float32 = int(np.prod(byte_shape)), np.dtype(np.float32)
        writer.add_tensor_info(name, shape, float32, size, quantization)
    with contextlib.closing(writer):
        _write_data(gguf, writer, tensors, advance)


def _write_data(
    gguf: Any,
    writer: Any,
    tensors: Sequence[_Tensor],
    advance: Callable[[str, int], Any],
) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        array, quantization = tensor.read(), gguf.GGMLQuantizationType[tensor.type]
        largest = float(np.abs(array).max(initial=0.0))
        if not math.isfinite(largest):
            raise ValueError(
                f"tensors must be finite, but '{tensor.name}' holds NaN or infinity; "
                "look at how it was made"
            )
        if not largest <= _LARGEST.get(tensor.type, math.inf):
            raise ValueError(
                f"'{tensor.name}' holds {largest:g}, which is infinite as "
                f"{tensor.type}; export as bf16 or f32"
            )
        writer.write_tensor_data(gguf.quants.quantize(array, quantization))
        advance(tensor.name, tensor.bytes)


def _file_type(gguf: Any, type: GGUFType) -> int:
    """GGUF's number of what most of the file is."""
    if type == "f32":
        return int(gguf.LlamaFileType.ALL_F32)
    return int(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])


def _why_not_gguf(path: Path) -> str | None:
    """Why a path must not be replaced: only an earlier GGUF may be."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(len(_MAGIC)) == _MAGIC:
            return None
    return "it is no GGUF file"


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "writing GGUF needs the package gguf; pip install '.[gguf]'"
        ) from None
    return gguf


_F16 = float(np.finfo(np.float16).max)
# Scales of whole levels are float16.
_LARGEST = {"F16": _F16, "Q8_0": 127 * _F16, "Q4_0": 8 * _F16}
