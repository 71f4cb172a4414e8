"""The model that a distillation follows, where it is another than the model before."""

from typing import Any

from jaxprune.files.safetensors_file import read_json
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.jobs.opening import open_for_job
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.shrink_settings import ShrinkJob
from jaxprune.lm.models.loaded_model import LoadedModel

_TOKENIZER = "tokenizer.json"


def open_teacher(
    job: PruneJob | ShrinkJob, source: CheckpointDir, model: LoadedModel
) -> LoadedModel | None:
    """The model of `--recover-teacher`, still in its files.

    Args:
      job: what was asked for.
      source: directory of the model that is pruned or made smaller.
      model: that model.

    Returns:
      The teacher, or None for the model before.

    Raises:
      ValueError: it has other tokens, or does not fit otherwise.
    """
    path = job.recovery.recover_teacher
    if path is None:
        return None
    directory = open_directory(path)
    teacher = open_for_job(path, job.loading, job.devices)
    if not _has_equal_tokens(directory, source):
        raise ValueError(
            f"--recover-teacher must have the model's tokens, but '{path}' has others; "
            "give a model of the same tokenizer"
        )
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"--recover-teacher must have as many logits as the model, but '{path}' "
            f"has {teacher.config.vocab_size} and the model {model.config.vocab_size}; "
            "give a model of the same vocab_size"
        )
    if not teacher.config.context >= job.calibration.length:
        raise ValueError(
            "--recover-teacher must take sequences of --length "
            f"{job.calibration.length}, but the context of '{path}' is "
            f"{teacher.config.context}; give shorter ones"
        )
    if job.recovery.recover_hidden and teacher.config.width != model.config.width:
        raise ValueError(
            "--recover-hidden compares the last hidden states channel by channel, but "
            f"'{path}' has {teacher.config.width} channels and the model "
            f"{model.config.width}; leave it out"
        )
    return teacher


def _has_equal_tokens(one: CheckpointDir, other: CheckpointDir) -> bool:
    """Whether tokens have equal ids; unknown, and so true, without a tokenizer.json."""
    files = [source.path / _TOKENIZER for source in (one, other)]
    if not all(file.is_file() for file in files):
        return True
    first, second = (_vocabulary(read_json(file)) for file in files)
    return first == second


def _vocabulary(tokenizer: Any) -> Any:
    """Tokens with their ids, as the tokenizers package holds them, added ones too."""
    if not isinstance(tokenizer, dict):
        return None
    model = tokenizer.get("model")
    added = {t["id"]: t["content"] for t in tokenizer.get("added_tokens") or ()}
    return model.get("vocab") if isinstance(model, dict) else None, added
