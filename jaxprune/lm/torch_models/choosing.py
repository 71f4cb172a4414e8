"""Which adapter does a step: the families of ours, or the classes of transformers."""

from typing import Any

from jaxprune.arrays.rules import check
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.steps import evaluate as families
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.evaluate import EvaluateJob
from jaxprune.lm.steps.option_rules import option_values
from jaxprune.lm.steps.prune import prepare_prune
from jaxprune.lm.steps.recover import prepare_recover
from jaxprune.lm.steps.settings import PruneJob, ShrinkJob, TrimJob
from jaxprune.lm.steps.shrink import prepare_shrink
from jaxprune.lm.steps.skeleton import Prepared
from jaxprune.lm.steps.trim import prepare_trim
from jaxprune.lm.torch_models import routing


def prepare_step(job: Any, console: Console) -> Prepared:
    """Reads what a step needs, and refuses what does not fit.

    Args:
      job: options of the step.
      console: where it speaks.

    Returns:
      The step, ready to run.

    Raises:
      ValueError: something does not fit; nothing was written.
      ImportError: the model goes through torch, which is not installed.
    """
    if isinstance(job, PruneJob) and routing.prunes_through_torch(job):
        routing.check_installed(open_directory(job.model).config)
        from jaxprune.lm.torch_models.prune import prepare_torch_prune

        return prepare_torch_prune(job, console)
    if isinstance(job, ShrinkJob) and routing.is_foreign_directory(job.model):
        routing.check_installed(open_directory(job.model).config)
        from jaxprune.lm.torch_models.shrink import prepare_torch_shrink

        return prepare_torch_shrink(job, console)
    match job:
        case PruneJob():
            return prepare_prune(job, console)
        case ShrinkJob():
            return prepare_shrink(job, console)
        case TrimJob():
            return prepare_trim(job, console)
    return prepare_recover(job, console)


def evaluate(job: EvaluateJob, console: Console) -> dict[str, Any]:
    """Measures a model on texts, or on other inputs where it goes through torch.

    Args:
      job: options of the measurement.
      console: where the result is said.

    Returns:
      The results by text; JSON-able.

    Raises:
      ValueError: the model or an input does not fit.
    """
    if not routing.is_foreign_directory(job.model):
        return families.evaluate(job, console)
    check(families.EVALUATE, **option_values(job), ours=False)
    routing.check_installed(open_directory(job.model).config)
    from jaxprune.lm.torch_models.evaluate import run_torch_eval  # imports torch

    return run_torch_eval(job, console)
