"""The rules of `jaxprune shrink --unequal`, of its settings and of the model."""

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.jobs.shrink_settings import Removal
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.shrinking.search import LEAST_SEQUENCES

RULES = (
    Rule(
        lambda v: not v.unequal or v.calibration,
        "--unequal chooses the sizes of layers by a text; give --calibration FILE..., "
        "or leave it out",
    ),
    Rule(
        lambda v: not v.unequal or v.ffn or v.heads or v.budget,
        "--unequal divides what goes of neurons and heads over the layers; give --ffn, "
        "--heads or --budget",
    ),
    Rule(
        lambda v: not v.unequal or not v.hidden,
        "--unequal gives each layer its own sizes, and --hidden all of them one width; "
        "shrink by one of them, then the result by the other",
    ),
    Rule(
        lambda v: not v.unequal or v.measure == "parameters",
        "--unequal counts parameters, and cannot divide {measure}; leave --measure out",
    ),
    Rule(
        lambda v: not v.unequal or not (v.search or v.query_heads),
        "--unequal removes whole key heads, with the query heads that share each, and "
        "searches by itself; leave out --search and --query-heads",
    ),
    Rule(
        # One sequence judges, three are calibrated on.
        lambda v: not v.unequal or v.sequences >= LEAST_SEQUENCES,
        f"--unequal needs at least {LEAST_SEQUENCES} sequences, since a quarter of "
        "them judges, got --sequences {sequences}",
    ),
)
"""What the options keep among themselves."""

_ONE_SIZE = Rule(
    lambda v: not v.unequal or not v.experts,
    "--unequal is for MLPs that all tokens take, and model_type {family} has experts",
    "leave it out",
)


def check_unequal(
    removal: Removal, source: CheckpointDir, config: DecoderConfig
) -> None:
    """Refuses layers of different sizes where a model cannot have them.

    Args:
      removal: what is to go.
      source: directory of the model.
      config: shape of the model.

    Raises:
      ValueError: the model is a mixture of experts.
    """
    family = source.config["model_type"]
    check([_ONE_SIZE], unequal=removal.unequal, experts=config.experts, family=family)
