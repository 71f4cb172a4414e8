"""Which directories go through torch: those whose model type is no family of ours.

Where a directory is both, ours is used: it reads the weights layer by layer. Nothing
here imports torch.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.checkpoints.checkpoint_dir import CONFIG
from jaxprune.lm.models.hf.families import FAMILIES
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import PruneJob

_PACKAGES = ("torch", "torchax", "transformers")


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of no family of ours, and names a class.

    Args:
      config: content of the config.json.

    Returns:
      True where transformers may know it.
    """
    # A file that names no class is one that transformers cannot load either.
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(model_type, str):  # refused by who reads it
        return False
    return model_type not in FAMILIES and isinstance(names, list) and bool(names)


def is_foreign_directory(directory: Path) -> bool:
    """Whether a directory is of no family of ours, and names a class.

    Args:
      directory: path, which need not be one.

    Returns:
      False too for what is no directory of a model: who opens it says so.
    """
    try:
        return is_foreign(read_json(directory / CONFIG))
    except (OSError, ValueError):
        return False


def prunes_through_torch(job: PruneJob) -> bool:
    """Whether a pruning goes through torch.

    Args:
      job: what was asked for.

    Returns:
      False too for magnitude without calibration, which needs no code of any model.
    """
    # Magnitude reads no program, and streams through any directory.
    by_weights = (
        job.pruning.effort is None  # each level is a method that runs the model
        and job.pruning.method in (None, "magnitude")
    )
    # What these do takes the model's code.
    texts = (*job.calibration.calibration, *job.calibration.evaluate)
    runs_model = texts or job.pruning.quantize
    return bool(not by_weights or runs_model) and is_foreign_directory(job.model)


def missing_packages() -> list[str]:
    """The packages of the extra [transformers] that are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def check_installed(config: Mapping[str, Any]) -> None:
    """Refuses a directory of another family where torch is not installed.

    Args:
      config: content of its config.json.

    Raises:
      ModuleNotFoundError: a package is missing; the sentence names the extra.
    """
    if missing := missing_packages():
        raise ModuleNotFoundError(
            f"model_type {config.get('model_type')} is no family of jaxprune's, so the "
            f"model goes through torch, but {' and '.join(missing)} is not installed; "
            "pip install '.[transformers]', or prune by magnitude without --calibration"
        )


def begin_through_torch(directory: Path, console: Console) -> None:
    """Says that a directory goes through torch, which must be installed.

    Args:
      directory: the directory.
      console: where it is said.

    Raises:
      ModuleNotFoundError: a package is missing.
    """
    config = read_json(directory / CONFIG)
    check_installed(config)
    console.note(
        f"model_type {config.get('model_type')} is no family of jaxprune's, so the "
        f"model goes through torch, as {config['architectures'][0]} of transformers"
    )
