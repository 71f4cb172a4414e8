"""What every subcommand takes: where its result goes, and what it says of an error."""

import dataclasses
from typing import ClassVar

from jaxprune.lm.steps.option_types import Switch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A subcommand; its `EXAMPLE` ends its --help.

    Attributes:
      json: print one JSON object to stdout, and nothing else there.
      debug: show where an error came from.
    """

    EXAMPLE: ClassVar[str]

    json: Switch = False
    debug: Switch = False
