"""What can be done with a directory that goes through torch, by its headers alone."""

from typing import Any, get_args

from jaxprune.arrays.rules import command_words
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.steps.settings import MethodName
from jaxprune.lm.torch_models.routing import check_installed
from jaxprune.lm.torch_models.shrink_sizes import shrinkable_units


def possible_through_torch(source: CheckpointDir) -> dict[str, Any]:
    """The methods that a directory can have, and what it can be shrunk by.

    Args:
      source: directory of no family of ours.

    Returns:
      "methods", "shrinkable", "through" and "unsupported", as `jaxprune inspect` has.
    """
    magnitude = {"methods": ["magnitude"], "shrinkable": [], "through": None}
    # Magnitude needs no torch.
    try:
        check_installed(source.config)
        # The class alone: no weight is read, and no module made.
        from jaxprune.lm.torch_models.opening import class_of

        name = class_of(source.config).__name__
    except (ValueError, ImportError) as error:
        return magnitude | {"unsupported": command_words(error)}
    return {
        "methods": list(get_args(MethodName)),
        "shrinkable": shrinkable_units(source.config),
        "through": f"torch, as {name}",
        "unsupported": None,
    }
