"""Options of the command that a model which goes through torch does not have.

They are refused before anything is opened, with what does the same elsewhere.
"""

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.jobs import passes
from jaxprune.lm.jobs.option_rules import not_while, option_values
from jaxprune.lm.jobs.prune_rules import check_pruning
from jaxprune.lm.jobs.prune_settings import PruneJob
from jaxprune.lm.jobs.shrink_rules import RULES as SHRINK_RULES
from jaxprune.lm.jobs.shrink_settings import ShrinkEvaluation, ShrinkJob
from jaxprune.lm.torch_models.model_inputs import check_input_files

_IN_TORCH = "train the written model on in torch: jp.torch.hold keeps its zeros"
_LAYERS = "build a smaller model in transformers, or give --ffn or --heads"


def _refused(option: str, hint: str) -> Rule:
    return not_while(
        "through_torch",
        option,
        "a model that goes through torch takes no {flag}",
        hint,
    )


LOADING_RULES = (
    _refused("ignore_config", "leave it out: transformers reads config.json"),
    _refused("bos", "leave it out: the model's tokenizer puts its own tokens around"),
    _refused("no_bos", "give token ids as .npy, which are used as they are"),
    _refused("mesh", "leave it out: it runs on one device"),
)
"""Of what every subcommand takes."""

JOB_RULES = (
    *LOADING_RULES,
    _refused("recover_steps", _IN_TORCH),
    Rule(
        lambda v: not v.self_sequences,
        "a model that goes through torch writes no --calibration self",
        "give --calibration with a text, a folder of pictures or of wav files, or .npz",
    ),
)
"""Of what prune and shrink take."""

_PRUNE_RULES = (
    *JOB_RULES,
    _refused("distributed", "leave it out: it runs on one device"),
    Rule(
        lambda v: v.calibration,
        "a model that goes through torch is pruned by what it does to inputs, and none "
        "are given",
        "give --calibration with a text, a folder of pictures or of wav files, or .npz "
        "of its arguments; or --method magnitude without options that run the model",
    ),
)
_SHRINK_RULES = (
    *JOB_RULES,
    _refused("vocab", "leave it out: tokens go from the families of ours alone"),
    _refused("layers", _LAYERS),
    _refused("drop_layers", _LAYERS),
    _refused("experts", _LAYERS),
    _refused("query_heads", "give --heads, of key heads with all their query heads"),
    _refused("budget", "give --ffn and --heads, or use jp.torch.shrink(keep=...)"),
    Rule(
        lambda v: v.speed_rounds == ShrinkEvaluation.speed_rounds,
        "a model that goes through torch takes no --speed-rounds",
        "leave it out: it is not timed",
    ),
)


def check_torch_prune(job: PruneJob) -> passes.Pass:
    """Refuses what can be refused of a pruning without opening the model.

    Args:
      job: what was asked for.

    Returns:
      What its words mean.

    Raises:
      ValueError: a rule is broken; the sentence names the option.
    """
    check(
        _PRUNE_RULES,
        **option_values(job),
        self_sequences=job.calibration.self_sequences,
        through_torch=True,
    )
    chosen = check_pruning(job, through_torch=True)
    check_input_files((*job.calibration.files, *job.evaluation.evaluate))
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
    return chosen


def check_torch_shrink(job: ShrinkJob) -> None:
    """Refuses what can be refused of a shrinking without opening the model.

    Args:
      job: what was asked for.

    Raises:
      ValueError: a rule is broken; the sentence names the option.
    """
    values = option_values(job) | {
        "asked": job.removal.asked,
        "files": job.calibration.files,
        "self_sequences": job.calibration.self_sequences,
        "through_torch": True,
    }
    check((*_SHRINK_RULES, *SHRINK_RULES), **values)
    check_input_files((*job.calibration.files, *job.evaluation.evaluate))
    rewrite.check_place(job.out, job.model, overwrite=job.overwrite)
