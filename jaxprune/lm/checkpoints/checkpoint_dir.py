"""A checkpoint directory as named tensors: config.json and safetensors, mapped.

Opening reads headers only and checks them against the files' sizes, so whatever is
opened can be read. `Damaged` means that files are not what they say; `Unknown` means
that the directory is another kind of thing, and says which. Nothing is unpickled, no
code is run, and no name in an index or link leads out of the directory.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from jaxprune.arrays import rules
from jaxprune.arrays.messages import listed
from jaxprune.files.safetensors_file import Damaged as Damaged
from jaxprune.files.safetensors_file import TensorInfo as TensorInfo
from jaxprune.files.safetensors_file import Unknown as Unknown
from jaxprune.files.safetensors_file import (
    damaged,
    is_plain,
    read_header,
    read_json,
    view,
)
from jaxprune.lm.checkpoints.directory_rules import (
    CONFIG,
    HAS_CONFIG,
    INDEX,
    INDEXED,
    INSIDE,
    ONE_FILE,
    PLACE,
    PLAIN_WEIGHTS,
    WEIGHT_MAP,
)

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_FOREIGN = (*_PICKLES, ".h5", ".msgpack", ".gguf")
_TOKENIZERS = (".model", ".tiktoken", ".spm", ".codes")
_COPIED = (*_TOKENIZERS, ".json", ".txt", ".md", ".jinja", ".py")
# What says that weights are quantized: of transformers, of MLX, of older releases.
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "README")

_NO_PICKLE = ", and pickle is never read, because it can run code"

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
    directory = _directory(directory)
    config = _config(directory)
    names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    weight_map = _index(directory)
    files = _shards(directory, names, weight_map)
    tensors: dict[str, TensorInfo] = {}
    metadata = {}
    # A tensor in two files would be read from whichever came last.
    for file in files:
        in_file, metadata[file] = read_header(_inside(directory, file))
        if repeated := [name for name in in_file if name in tensors]:
            raise damaged(
                directory / file, f"it holds {listed(repeated)} a second time"
            )
        tensors |= in_file
    if weight_map is not None:
        _check_index(directory, weight_map, tensors)
    other_files = [name for name in files_below(directory) if name not in files]
    others = [
        name
        for name in other_files
        # Whoever opens a named pipe waits for a writer.
        if _belongs(name, other_files) and not is_special(directory / name)
    ]
    # As loaders look for them.
    first = [name for name in (CONFIG, INDEX) if name in others]
    for name in others:
        if not _inside(directory, name).exists():
            raise damaged(directory / name, "it is a link to what is not there")
    return CheckpointDir(
        path=directory,
        config=config,
        tensors=tensors,
        metadata=metadata,
        indexed=weight_map is not None,
        others=(*first, *(name for name in others if name not in first)),
        uncopied=tuple(name for name in other_files if name not in others),
    )


def files_below(directory: Path) -> list[str]:
    """Every file in a directory and its sub-directories, by its path there with "/"."""
    # Links to files are files; links to directories are listed and not followed.
    paths = []
    for root, folders, files in os.walk(directory, onerror=_refuse):
        place = Path(root).relative_to(directory)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        paths += [(place / name).as_posix() for name in (*files, *links)]
    return sorted(paths)


def is_special(path: Path) -> bool:
    """Whether a path is a named pipe, a socket or a device, or a link to one."""
    return path.exists() and not (path.is_file() or path.is_dir())


def _refuse(error: OSError) -> None:
    raise error  # else what cannot be read would be missing without a word


def leads_out(directory: Path, name: str) -> bool:
    """Whether a file of a directory is a link out of it, or out of the hub's cache."""
    home = directory.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")  # the hub's cache
    # Every link on the way is followed.
    target = (directory / name).resolve()
    return not any(target.is_relative_to(place) for place in homes)


def _directory(path: str | os.PathLike[str]) -> Path:
    directory = Path(path).absolute()
    rules.check(PLACE, path=path, place=directory)
    return directory


def _config(directory: Path) -> dict[str, Any]:
    rules.check([HAS_CONFIG], directory=directory)
    path = _inside(directory, CONFIG)
    config = read_json(path)
    # A model of models says it of one of its parts.
    parts = [config, *(v for v in config.values() if isinstance(v, dict))]
    quantized = [f"'{path}' has a {k}" for k in _QUANTIZED for p in parts if p.get(k)]
    if (directory / "quantize_config.json").is_file():  # of AutoGPTQ
        quantized.append(f"'{directory}' has a quantize_config.json")
    rules.check([PLAIN_WEIGHTS], quantized=quantized)
    return config


def _index(directory: Path) -> dict[str, str] | None:
    """Tensor name to file name, or None where there is no index."""
    if not (directory / INDEX).is_file():
        return None
    path = _inside(directory, INDEX)
    weight_map: Any = read_json(path).get("weight_map")
    rules.check([WEIGHT_MAP], path=path, weight_map=weight_map)
    files = sorted({*weight_map.values()})
    rules.check(
        INDEXED,
        path=path,
        directory=directory,
        files=files,
        illegal=listed([file for file in files if not is_plain(file)]),
        foreign=listed([f for f in files if not f.endswith(".safetensors")]),
    )
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise damaged(path, f"it lists {listed(missing)}, and no such file is here")
    return weight_map


def _shards(
    directory: Path, names: Sequence[str], weight_map: dict[str, str] | None
) -> list[str]:
    """The files that an index lists, or the only one where there is no index."""
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    files = [name for name in names if name.endswith(".safetensors")]
    foreign = [name for name in names if name.endswith(_FOREIGN)]
    # What else lies there tells the user what to convert.
    pickled = any(name.endswith(_PICKLES) for name in foreign)
    rules.check(
        ONE_FILE,
        directory=directory,
        files=files,
        candidates=listed(files),
        foreign=listed(foreign) or "none",
        reason=_NO_PICKLE if pickled else "",
    )
    return files


def _check_index(
    directory: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]
) -> None:
    path = directory / INDEX
    # The index may name tensors, or their files, that are not there.
    absent = [
        f"'{name}' in '{file}'"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if absent:
        raise damaged(path, f"it lists what is not there: {'; '.join(absent[:6])}")
    if extra := [name for name in tensors if name not in weight_map]:
        raise damaged(path, f"it does not list {listed(extra)} of its own files")


def _inside(directory: Path, name: str) -> Path:
    """The path of a file of the directory, refused where a link leads out of it."""
    path = directory / name
    rules.check(
        [INSIDE], path=path, target=path.resolve(), out=leads_out(directory, name)
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
