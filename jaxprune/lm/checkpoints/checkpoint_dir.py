"""A checkpoint directory as named tensors: config.json and safetensors, mapped.

Opening reads headers only and checks them against the files' sizes, so whatever is
opened can be read. `Damaged` means that files are not what they say; `Unknown` means
that the directory is another kind of thing, and says which. Nothing is unpickled, no
code is run, and no name in an index or link leads out of the directory.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from jaxprune.arrays.messages import listed
from jaxprune.files.safetensors_file import Damaged as Damaged
from jaxprune.files.safetensors_file import TensorInfo as TensorInfo
from jaxprune.files.safetensors_file import Unknown as Unknown
from jaxprune.files.safetensors_file import (
    damaged,
    is_plain,
    is_text,
    read_header,
    read_json,
    view,
)

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FOREIGN = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf")
_TOKENIZERS = (".model", ".tiktoken", ".spm", ".codes")
_COPIED = (*_TOKENIZERS, ".json", ".txt", ".md", ".jinja", ".py")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README")
# Entries that mark quantized weights: transformers', MLX's, older releases'.
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
# "google/gemma-3-270m" is what people have: a model's name on the Hugging Face hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what was done last, the bytes that are done, and the bytes in all."""


@dataclasses.dataclass(frozen=True)
class CheckpointDir:
    """An opened checkpoint directory.

    Attributes:
      path: absolute path of the directory.
      config: content of config.json.
      tensors: name to place, file after file by name, as they lie in each.
      metadata: each safetensors file's `__metadata__`.
      indexed: whether an index lists the tensors.
      others: the files beside the weights that belong to the model, sub-directories'
        too, by their path in the directory with "/": config.json first, then the index,
        tokenizer, generation settings, licence and model code (copied, never run).
      uncopied: all else that lies in the directory, likewise: weights in other formats,
        hidden files, and what is no regular file, such as a named pipe.
      is_mapped: whether `read` gives a view of the file, which costs nothing.
    """

    is_mapped: ClassVar[bool] = True

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    metadata: dict[str, dict[str, str]]
    indexed: bool
    others: tuple[str, ...]
    uncopied: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(info.size for info in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of its file.

        Nothing is loaded until it is looked at, and the map ends with the array.

        Args:
          name: one of `tensors`.

        Returns:
          The array, in the stored dtype and shape.

        Raises:
          ValueError: there is no such tensor.
          Damaged: the file became shorter since it was opened.
        """
        if name not in self.tensors:
            raise ValueError(
                f"'{self.path}' has no tensor '{name}'; it has {listed(self.tensors)}"
            )
        info = self.tensors[name]
        return view(self.path / info.file, info)

    def meter(self, progress: Progress | None) -> Callable[[str, int], None]:
        """What adds up the bytes that are done, for `progress`."""
        total, done = self.size, 0

        def advance(what: str, size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(what, done, total)

        return advance


def open_directory(directory: str | os.PathLike[str]) -> CheckpointDir:
    """Opens a directory with config.json and safetensors, reading headers only.

    Links are followed inside the directory, and from a snapshot of Hugging Face's cache
    to its blobs; a link that leads elsewhere is refused.

    Args:
      directory: path of a local one; nothing is downloaded.

    Returns:
      The opened directory.

    Raises:
      FileNotFoundError: there is no such directory.
      Unknown: it is none that is read here: no config.json, weights that are not
        safetensors, several files and no index, quantised weights, an unknown dtype, a
        link out of the directory.
      Damaged: a file is cut short or inconsistent, or a tensor or file is missing.

    Example:
      >>> import json, pathlib, tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> _ = (directory / "config.json").write_text('{"model_type": "llama"}')
      >>> save_file({"w": np.eye(2, dtype="f4")}, directory / "model.safetensors")
      >>> opened = open_directory(directory)
      >>> opened.tensors["w"].shape, opened.read("w").tolist()
      ((2, 2), [[1.0, 0.0], [0.0, 1.0]])
    """
    directory, config = _opened(directory)
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    weight_map = _index(directory, names)
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
    else:
        files = [name for name in names if name.endswith(".safetensors")]
        foreign = [name for name in names if name.endswith(_FOREIGN)]
        if len(files) > 1:
            raise Unknown(
                f"several safetensors files need a {INDEX} that says which belong to "
                f"the model, but '{directory}' has {listed(files)} and none; keep one "
                "of them, or add the index"
            )
        if not files:  # what else lies there tells the user what to convert
            raise Unknown(
                f"weights must be *.safetensors, but '{directory}' has "
                f"{listed(foreign) or 'none'}; convert the model with the safetensors "
                "package (pickle is never read, because it can run code)"
            )
    tensors: dict[str, TensorInfo] = {}
    metadata = {}
    for file in files:
        in_file, metadata[file] = read_header(_inside(directory, file))
        tensors |= in_file
    if weight_map is not None:
        places = {name: info.file for name, info in tensors.items()}
        differing = {name for name, _ in weight_map.items() ^ places.items()}
        if differing:
            raise damaged(
                directory / INDEX,
                f"{listed(sorted(differing))} lie in other files than it says",
            )
    other_files = [name for name in files_below(directory) if name not in files]
    others = [name for name in other_files if _belongs(name, other_files)]
    # Whoever opens a named pipe waits for a writer.
    others = [name for name in others if not _is_special(directory / name)]
    for name in others:
        if not _inside(directory, name).exists():
            raise damaged(directory / name, "it is a link to what is not there")
    # As loaders look for them.
    first = [name for name in (CONFIG, INDEX) if name in others]
    return CheckpointDir(
        path=directory,
        config=config,
        tensors=tensors,
        metadata=metadata,
        indexed=weight_map is not None,
        others=(*first, *(name for name in others if name not in first)),
        uncopied=tuple(name for name in other_files if name not in others),
    )


def _opened(place: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """The absolute path of a directory, and its config.json."""
    directory = Path(place).absolute()
    if not directory.exists():
        hint = f"give a local directory with {CONFIG} and *.safetensors"
        if _HUB_NAME.fullmatch(str(place)):
            hint = (
                f"`hf download {place} --local-dir {directory.name}` fetches a model "
                f"of the Hugging Face hub, and then give '{directory.name}'"
            )
        raise FileNotFoundError(
            f"there is no directory '{place}', and nothing is downloaded; {hint}"
        )
    if not (directory / CONFIG).is_file():
        raise Unknown(
            f"a model is a directory with {CONFIG} and *.safetensors, but '{place}' "
            f"has no {CONFIG}; give the directory that holds it"
        )
    path = _inside(directory, CONFIG)
    config = read_json(path)
    # A model of several models has the entry in the part that is quantized.
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    quantized = [f"'{path}' has a {k}" for k in _QUANTIZED for p in parts if p.get(k)]
    if (directory / "quantize_config.json").is_file():  # of AutoGPTQ
        quantized.append(f"'{directory}' has a quantize_config.json")
    if quantized:
        raise Unknown(
            f"weights must be plain floating numbers, but {quantized[0]}; save the "
            "model dequantised and give that directory"
        )
    return directory, config


def _index(directory: Path, names: Collection[str]) -> dict[str, str] | None:
    """Tensor name to file name, or None where there is no index."""
    if INDEX not in names:
        return None
    path = _inside(directory, INDEX)
    weight_map: Any = read_json(path).get("weight_map")
    if not (weight_map and is_text(weight_map)) or not all(
        map(is_plain, weight_map.values())
    ):
        raise damaged(path, "its weight_map must give files of its own directory")
    files = set(weight_map.values())
    # MLX writes an index of a single file too.
    if _SINGLE in names and _SINGLE not in files:
        raise Unknown(
            f"'{directory}' must hold one set of weights, but has both {_SINGLE} and "
            f"{INDEX}; move one of the two elsewhere"
        )
    if foreign := sorted(f for f in files if not f.endswith(".safetensors")):
        raise Unknown(
            f"weights must be *.safetensors, but '{path}' lists {listed(foreign)}; "
            "convert them with the safetensors package"
        )
    if missing := sorted(files.difference(names)):
        raise damaged(path, f"it lists {listed(missing)}, and no such file is here")
    return weight_map


def files_below(directory: Path) -> list[str]:
    """Every file in a directory and its sub-directories, by its path there with "/"."""

    def refuse(error: OSError) -> None:
        raise error  # else what cannot be read would be missing without a word

    # Links to files are files; links to directories are listed and not followed.
    paths = []
    for root, folders, files in os.walk(directory, onerror=refuse):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        place = Path(root).relative_to(directory)
        paths += [(place / name).as_posix() for name in (*files, *links)]
    return sorted(paths)


def _is_special(path: Path) -> bool:
    """Whether a path is a named pipe, a socket or a device, or a link to one."""
    return path.exists() and not (path.is_file() or path.is_dir())


def leads_out(directory: Path, name: str) -> bool:
    """Whether a file of a directory is a link out of it, or out of the hub's cache."""
    home = directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")  # the hub's cache
    target = (directory / name).resolve()  # follows every link on the way
    return not any(target.is_relative_to(place) for place in homes)


def _inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory, refused where a link leads out of it."""
    path = directory / name
    if leads_out(directory, name):
        raise Unknown(
            f"'{path}' is a link to '{path.resolve()}', outside the model's directory; "
            "copy the file into the directory"
        )
    return path


def _belongs(path: str, files: Collection[str]) -> bool:
    """Whether a file that holds no weights of the model's own is part of it."""
    if path == INDEX:
        return True
    *folders, name = path.split("/")
    # Hidden: caches, version control.
    if any(p.startswith(".") for p in (*folders, name)):
        return False
    if any(re.fullmatch(r"checkpoint-\d+", p) for p in folders):
        return False  # of a training: another model, whose weights are left too
    if name.endswith((".safetensors", ".index.json")):
        # A module of sentence-transformers, "2_Dense/model.safetensors" say; the
        # checkpoints of a training are other models.
        return "modules.json" in files and bool(re.match(r"\d+_[^/]*/", path))
    is_copied = name.endswith(_COPIED) or ".model.v" in name  # tokenizer.model.v3
    return is_copied or name.upper().split(".")[0] in _LEGAL
