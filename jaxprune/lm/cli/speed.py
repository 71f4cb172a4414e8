"""`jaxprune speed`: tokens a second of several models, timed in turn."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxprune.arrays.messages import columns
from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.cli.options import Options
from jaxprune.lm.report import speeds
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.option_rules import at_least, option_values
from jaxprune.lm.steps.option_types import UNSET, Count, Names, choice_of
from jaxprune.lm.steps.packing import PACKING_RULES, Packing
from jaxprune.lm.steps.settings import Dtype, Loading
from jaxprune.lm.steps.speed import read_candidates, time_candidates

_RULES = (
    Rule(lambda v: v.models, "speed needs at least one model, got none"),
    *(at_least(option, 1) for option in ("prompt", "steps", "batch", "rounds")),
    *PACKING_RULES,
    Rule(
        lambda v: len({*v.models}) == len(v.models),
        "each model is timed by its name, but one is given twice",
        "the first is timed twice as it is",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed(Options):
    """Times directories and compact files in turn, in one process.

    Prefill is a pass over a prompt, decoding draws token after token; the head is part
    of both. Each is compared with the first model, which is timed twice: a ratio that
    is within what the first one differs from itself is not distinguishable.

    Attributes:
      models: directories, and compact files of some; all are in memory at once.
      prompt: tokens of the prompt; fewer where a context is short.
      steps: tokens that are decoded after it.
      batch: sequences at once.
      rounds: how often each model is timed; with less than 3 no difference counts.
      dtype: the dtype of parameters and products; as they are stored if left out.
        Packed parameters stay as they are.
      ignore_config: attributes of config.json to read as if they were not there.
    """

    EXAMPLE: ClassVar = "jaxprune speed MODEL OUT --packed"

    models: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="MODEL [MODEL ...]", help_behavior_hint=""),
    ]
    prompt: Count = 256
    steps: Count = 32
    batch: Count = 1
    rounds: Count = 5
    dtype: Annotated[Dtype | None, choice_of(Dtype), UNSET] = None
    ignore_config: Names = ()
    packing: Packing = dataclasses.field(default_factory=Packing)

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Times the models; the speeds by model."""
        check(_RULES, **option_values(self))
        loading = Loading(dtype=self.dtype, ignore_config=self.ignore_config)
        candidates = read_candidates(
            self.models, loading, self.packing, self.batch, console
        )
        record = time_candidates(
            candidates,
            prompt=self.prompt,
            steps=self.steps,
            batch=self.batch,
            rounds=self.rounds,
        )
        console.say(columns(speeds.model_rows(record), right=True))
        return record
