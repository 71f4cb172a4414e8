"""`jaxprune eval`: the perplexity of a model on texts, and its bits per byte."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.cli import summary
from jaxprune.lm.cli.options import Options
from jaxprune.lm.jobs.console import Console
from jaxprune.lm.jobs.opening import (
    needed_tokenizer,
    note_ignored,
    text_beginning,
)
from jaxprune.lm.jobs.option_rules import at_least, not_while, option_values
from jaxprune.lm.jobs.option_types import (
    Count,
    MaybeCount,
    MaybePath,
    MaybeText,
    ModelPath,
)
from jaxprune.lm.jobs.packing import (
    PACKING_RULES,
    Packing,
    open_packable,
    read_decoder,
)
from jaxprune.lm.jobs.settings import (
    CONTEXT,
    WINDOWS,
    Devices,
    Loading,
    LoadingGroup,
)
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import (
    describe_windows,
    measure_texts,
    name_texts,
    perplexity_table,
)
from jaxprune.lm.texts import text_files
from jaxprune.lm.torch_models import routing

_RULES = (
    *PACKING_RULES,
    at_least("limit", 0),
    at_least("batch", 1),
    at_least("context", 2, " tokens"),
    Rule(
        lambda v: v.stride is None or 1 <= v.stride <= v.context,
        "--stride must be 1 <= stride <= context, got --stride {stride} and --context "
        "{context}",
    ),
    *(
        not_while(
            "ours",
            option,
            "{flag} is for models that go through torch, which are those of no family "
            "of ours",
            "leave it out",
        )
        for option in ("dense", "metric")
    ),
    Rule(
        lambda v: v.ours is not False or not (v.packed or v.values),
        "--packed and --values are for the families of ours, and this model goes "
        "through torch",
        "leave them out",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Options):
    """Measures a model's perplexity on texts, in windows of a context and a stride.

    A window of --context tokens moves on by --stride; of each window only the tokens
    that were not predicted before count. Shorter strides give more context and take
    longer. Bits per byte compare models whose tokenizers differ.

    Attributes:
      model: the directory, or a compact file of one.
      text: plain text (.txt, .md); .jsonl or .parquet with a "text" in each line or
        row, or "messages", which the model's chat template writes; or .npy of int32
        token ids (sequences, length), whose rows are evaluated as they are.
      context: tokens of a window, BOS included; the model's context where that is less.
      stride: how far a window moves on, at most --context. A window predicts
        --context - 1 tokens; it moves on as far as that if left out.
      limit: how many windows of each text are evaluated, from its beginning; 0 takes
        all.
      batch: how many windows the model sees at once.
      dense: of a model that goes through torch, the directory that its outputs are
        compared with. --text then takes what --calibration of prune takes.
      metric: of such a model, a measure of your own, MODULE:FUNCTION, as for prune.
    """

    EXAMPLE: ClassVar = "jaxprune eval MODEL --text prose.txt code.jsonl"

    model: ModelPath
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    context: Count = CONTEXT
    stride: MaybeCount = None
    limit: Count = WINDOWS
    batch: Count = 4
    dense: MaybePath = None
    metric: MaybeText = None
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)
    devices: Devices = dataclasses.field(default_factory=Devices)
    packing: Packing = dataclasses.field(default_factory=Packing)

    def run(self, console: Console, words: list[str]) -> dict[str, Any]:
        """Measures the model; the results by text."""
        if routing.is_foreign_directory(self.model):
            return self._run_through_torch(console)
        # Of what is not there nobody knows the family; opening it says so.
        exists = self.model.exists()
        check(_RULES, **option_values(self), ours=exists or None)
        if exists:
            text_files.check_text_files(self.text)
        with open_source(self.model) as source:
            return self._run(console, source)

    def _run(self, console: Console, source: CheckpointDir) -> dict[str, Any]:
        model = open_packable(source, self.loading, self.devices, self.packing)
        vocab_size, longest = model.config.vocab_size, model.config.context
        tokenizer, begins = text_beginning(
            needed_tokenizer(source.path, self.text), self.loading, vocab_size
        )
        note_ignored(model, console)
        paths = tuple(dict.fromkeys(self.text))  # one given twice is read once
        files = [text_files.read_text(path, tokenizer, vocab_size) for path in paths]
        # A length that nobody asked for gives way to a short context.
        context = longest if self.context == CONTEXT > longest else self.context
        windows = {
            name: perplexity.windows_of_text(
                file,
                context=context,
                stride=self.stride,
                bos=begins.token,
                limit=self.limit or None,
                longest=longest,
                tokenizer=tokenizer,
            )
            for name, file in zip(name_texts(paths), files, strict=True)
        }
        # All has been checked: now the weights are read.
        decoder, packed = read_decoder(model, source, self.packing, console)
        measured = measure_texts(decoder, windows, self.batch)
        results = {
            name: describe_windows(windows[name])
            | {"sha256": file.sha256}
            | measured[name]
            for name, file in zip(windows, files, strict=True)
        }
        console.say(perplexity_table(results))
        console.say(f"sequences begin with {begins.why}")
        _note_limit(results, self.limit, console)
        return {
            "model": str(self.model),
            "bos": begins.why,
            "texts": results,
            "ignored_config": model.ignored,
            "packed": packed,
        }

    def _run_through_torch(self, console: Console) -> dict[str, Any]:
        check(_RULES, **option_values(self), ours=False)
        routing.check_installed(open_directory(self.model).config)
        # Imports torch, so only now.
        from jaxprune.lm.torch_models.evaluate import Evaluation, run_torch_eval

        asked = Evaluation(
            inputs=self.text,
            **{n: getattr(self, n) for n in Evaluation._fields if n != "inputs"},
        )
        result = run_torch_eval(asked, console)
        for table in summary.likeness_tables(result):
            console.say(table)
        _note_limit(result["texts"], self.limit, console)
        return result


def _note_limit(results: Mapping[str, Any], limit: int, console: Console) -> None:
    """Says which texts may have more than the windows that were evaluated."""
    if full := [name for name, text in results.items() if text["windows"] == limit]:
        console.note(
            f"at most {limit} windows of each text, as in prune and shrink: "
            f"{listed(full)} may be longer; --limit 0 takes all"
        )
