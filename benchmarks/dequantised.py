"""A GGUF file that a package carries, as a plain Hugging Face directory.

transformers reads and dequantises it, and the weights are written as they then are:
what a user of any real checkpoint starts from. They are for measurements only: nothing
of them is part of this repository or of its releases.
"""

import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# accelerate: transformers asks for it before it reads such a file.
READERS = ("torch", "transformers", "gguf", "accelerate")


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes the model as a Hugging Face directory.

    Attributes:
      out: the directory to write; it must not exist.
      dtype: dtype of the weights. The dequantised values do not fit bfloat16 exactly.
    """

    out: Annotated[Path, tyro.conf.Positional]
    dtype: Literal["float32", "bfloat16"] = "float32"


def write(config: Config, file: Callable[[Path], Path]) -> None:
    """Dequantises and writes; then says where.

    Args:
      config: directory to write, and the dtype.
      file: function that gives the GGUF file; it may make it in the folder that it
        gets.

    Raises:
      FileExistsError: there is something at `out`.
    """
    if config.out.exists():
        raise FileExistsError(f"OUT must not exist, got '{config.out}'; remove it")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system.
    with tempfile.TemporaryDirectory(dir=config.out.parent) as folder:
        model, tokenizer = _read(file(Path(folder)), config.dtype)
        written = Path(folder) / "model"
        # Several shards, as large models have them: readers must cope with these.
        model.save_pretrained(written, max_shard_size="300MB")
        tokenizer.save_pretrained(written)
        os.rename(written, config.out)
    print(f"Wrote {model.num_parameters():,} {config.dtype} weights to {config.out}.")


def require(packages: tuple[str, ...]) -> None:
    """Checks that packages are installed.

    Args:
      packages: names of the packages on the package index.

    Raises:
      ModuleNotFoundError: the sentence names what is missing and how to install it.
    """
    modules = {name: name.replace("-", "_") for name in packages}
    missing = [k for k, v in modules.items() if importlib.util.find_spec(v) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the benchmarks of real checkpoints need {', '.join(missing)}, not "
            f"installed here; run `pip install {' '.join(missing)}`"
        )


def check(package: str, release: str, expected: str, got: str) -> None:
    """Refuses another file than the one that was measured.

    Args:
      package: name of the package on the package index.
      release: release that has the file.
      expected: SHA-256 of the file that was measured.
      got: SHA-256 of the file that the package has.

    Raises:
      ValueError: they differ.
    """
    if got != expected:
        raise ValueError(
            f"{package} must hold the file with SHA-256 {expected}, got {got}; "
            f"install its release {release}"
        )


def _read(file: Path, dtype: str) -> tuple[Any, Any]:
    """The model without a word of its quantisation, and the tokenizer."""
    import torch
    import transformers

    kwargs = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=getattr(torch, dtype), **kwargs
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **kwargs)
    # Plain weights now: nothing in the directory speaks of the file they came from.
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        delattr(model.config, name)
    return model, tokenizer
