"""The perplexity of a model on texts, and its bits per byte."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxprune.arrays.rules import Rule, check
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.corpora import text_files
from jaxprune.lm.measure import perplexity
from jaxprune.lm.measure.tables import (
    describe_windows,
    measure_texts,
    name_texts,
    perplexity_table,
)
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.opening import (
    needed_tokenizer,
    note_ignored,
    text_beginning,
)
from jaxprune.lm.steps.option_rules import at_least, not_while, option_values
from jaxprune.lm.steps.option_types import (
    Count,
    MaybeCount,
    MaybePath,
    MaybeText,
    ModelPath,
)
from jaxprune.lm.steps.packing import (
    PACKING_RULES,
    Packing,
    open_packable,
    read_decoder,
)
from jaxprune.lm.steps.settings import CONTEXT, WINDOWS, Loading, LoadingGroup

EVALUATE = (
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
class EvaluateJob:
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
      metric: of such a model, a measure of your own, MODULE:FUNCTION: called with the
        torch module and a list of batches of its arguments, it returns a number or
        {name: number}.
    """

    model: ModelPath
    text: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE [FILE ...]")]
    context: Count = CONTEXT
    stride: MaybeCount = None
    limit: Count = WINDOWS
    batch: Count = 4
    dense: MaybePath = None
    metric: MaybeText = None
    loading: LoadingGroup = dataclasses.field(default_factory=Loading)
    packing: Packing = dataclasses.field(default_factory=Packing)


def evaluate(job: EvaluateJob, console: Console) -> dict[str, Any]:
    """Measures a model of a family of ours.

    Args:
      job: options of the measurement.
      console: where the result is said.

    Returns:
      The results by text; JSON-able.

    Raises:
      ValueError: the model or a text does not fit.
    """
    # Of what is not there nobody knows the family; opening it says so.
    exists = job.model.exists()
    check(EVALUATE, **option_values(job), ours=exists or None)
    if exists:
        text_files.check_text_files(job.text)
    with open_source(job.model) as source:
        model = open_packable(source, job.loading, job.packing)
        vocab_size, longest = model.config.vocab_size, model.config.context
        tokenizer, begins = text_beginning(
            needed_tokenizer(source.path, job.text), job.loading.bos, vocab_size
        )
        note_ignored(model, console)
        paths = tuple(dict.fromkeys(job.text))  # one given twice is read once
        files = [text_files.read_text(path, tokenizer, vocab_size) for path in paths]
        # A length that nobody asked for gives way to a short context.
        context = longest if job.context == CONTEXT > longest else job.context
        windows = {
            name: perplexity.windows_of_text(
                file,
                context=context,
                stride=job.stride,
                bos=begins.token,
                limit=job.limit or None,
                longest=longest,
                tokenizer=tokenizer,
            )
            for name, file in zip(name_texts(paths), files, strict=True)
        }
        # All has been checked: now the weights are read.
        decoder, packed = read_decoder(model, source, job.packing, console)
        measured = measure_texts(decoder, windows, job.batch)
        results = {
            name: describe_windows(windows[name])
            | {"sha256": file.sha256}
            | measured[name]
            for name, file in zip(windows, files, strict=True)
        }
    console.say(perplexity_table(results))
    console.say(f"sequences begin with {begins.why}")
    return {
        "model": str(job.model),
        "bos": begins.why,
        "texts": results,
        "ignored_config": model.ignored,
        "packed": packed,
    }
