"""`jaxprune eval`: the perplexity of a model on texts, and its bits per byte."""

import dataclasses
from typing import Any, ClassVar

from jaxprune.arrays.messages import listed
from jaxprune.lm.cli import summary
from jaxprune.lm.cli.options import Options
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.evaluate import EvaluateJob
from jaxprune.lm.torch_models.choosing import evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(EvaluateJob, Options):
    """Measures a model's perplexity on texts, in windows of a context and a stride.

    A window of --context tokens moves on by --stride; of each window only the tokens
    that were not predicted before count. Shorter strides give more context and take
    longer. Bits per byte compare models whose tokenizers differ.
    """

    EXAMPLE: ClassVar = "jaxprune eval MODEL --text prose.txt code.jsonl"

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Measures the model; the results by text."""
        result = evaluate(self, console)
        for table in summary.likeness_tables(result):
            console.say(table)
        # Texts may have more than the windows that were evaluated.
        texts = result["texts"].items()
        if full := [name for name, of in texts if of["windows"] == self.limit]:
            console.note(
                f"at most {self.limit} windows of each text, as in prune and shrink: "
                f"{listed(full)} may be longer; --limit 0 takes all"
            )
        return result
