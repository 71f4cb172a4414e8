"""How fast directories and compact files run, as they are and packed."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune.arrays import tree
from jaxprune.arrays.console_progress import Progress
from jaxprune.lm.checkpoints.compact_source import open_source
from jaxprune.lm.measure import speed
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.packing.packed_decoder import pack_decoder
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.opening import note_ignored, read_dense
from jaxprune.lm.steps.packing import (
    Packing,
    describe_packing,
    open_packable,
    packing_line,
)
from jaxprune.lm.steps.settings import Loading

_LOOKED_UP = ("embedding/embedding", "position_embedding/embedding")


class Candidate(NamedTuple):
    """A model that is timed.

    Attributes:
      decoder: the model.
      facts: JSON-able: "model", "dtype" of its products, "bytes_a_step" that decoding
        a token of each sequence reads of the parameters, and "packed", what was packed.
    """

    decoder: Any
    facts: dict[str, Any]


def read_candidates(
    paths: Sequence[Path],
    loading: Loading,
    packing: Packing,
    batch: int,
    console: Console,
) -> dict[str, Candidate]:
    """The models that are timed, all in memory.

    Args:
      paths: directories and compact files.
      loading: settings of the models.
      packing: settings that say whether each is timed packed as well.
      batch: number of sequences that are decoded together.
      console: where it says what is packed.

    Returns:
      Candidates by name.
    """
    forms = [Packing(), packing] if packing.packed else [Packing()]
    candidates: dict[str, Candidate] = {}
    for path, form in itertools.product(paths, forms):
        with open_source(path) as source:
            model = open_packable(source, loading, form)
            if not form.packed:
                note_ignored(model, console)
            name = f"{path}, packed" if form.packed else str(path)
            candidates[name] = _candidate(model, source, form, batch)
            if form.packed:
                line = packing_line(candidates[name].facts["packed"])
                console.note(f"{name}: {line}")
    return candidates


def _candidate(model: LoadedModel, source: Any, form: Packing, batch: int) -> Candidate:
    facts: dict[str, Any] = {"dtype": model.config.dtype, "packed": None}
    decoder: Any
    if form.packed:
        packed = pack_decoder(model, source, values=form.values)
        decoder, leaves = packed.decoder, packed.leaves
        facts["packed"] = describe_packing(packed.report)
    else:
        read = read_dense(model)
        decoder, leaves = read.decoder(), tree.named_leaves(read.params)
    facts["bytes_a_step"] = step_bytes(leaves, model.config, batch)
    return Candidate(decoder, facts)


def step_bytes(leaves: Mapping[str, Any], config: DecoderConfig, batch: int) -> int:
    """The bytes of the parameters that decoding one token of each sequence reads.

    Args:
      leaves: leaf name to an array, a packed matrix, or several.
      config: shape of the model.
      batch: number of sequences.

    Returns:
      The bytes of all parameters, the head's included, but of a table only the rows
      that are looked up, and of experts the share that tokens are sent to, at most.
    """
    total = 0.0
    for name, leaf in leaves.items():
        size = sum(array.nbytes for array in jax.tree.leaves(leaf))
        shape: tuple[int, ...] = getattr(
            leaf, "shape", ()
        )  # of several parts none is a table
        tied = config.tie_weights and name == _LOOKED_UP[0]
        if name in _LOOKED_UP and not tied:
            size *= batch / max(1, shape[0])
        # Experts are stacked in front; a token is sent to a few of them.
        elif config.experts and len(shape) == 3 and shape[0] == config.experts:
            size *= min(1, batch * config.experts_per_token / config.experts)
        total += size
    return round(total)


def time_candidates(
    candidates: Mapping[str, Candidate],
    *,
    prompt: int,
    steps: int,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Times the candidates in turn, the first one twice.

    Args:
      candidates: models by name; others are compared with the first.
      prompt: number of tokens of the prompt, at most.
      steps: number of tokens that are decoded, at most.
      batch: number of sequences at once.
      rounds: number of times that each is timed.

    Returns:
      JSON-able: the numbers, and "models", name to the facts of a candidate, its
      speeds, and but for the first "ratios"; see `compare_speed`.
    """
    context = min(c.decoder.config.context for c in candidates.values())
    steps = min(steps, max(1, context // 2))  # as many fit a short context
    prompt = min(prompt, context - steps)
    first = next(iter(candidates))
    again = f"{first}, again"
    models = {name: candidate.decoder for name, candidate in candidates.items()}
    models[again] = models[first]
    with Progress(len(models) * rounds, "timing", unit="run", leave=False) as progress:
        times = speed.measure_speed(
            models,
            prompt=prompt,
            steps=steps,
            batch=batch,
            rounds=rounds,
            progress=progress.update,
        )
    results: dict[str, Any] = {}
    for name, candidate in candidates.items():
        results[name] = {**candidate.facts, **times[name]}
        if name != first:
            ratios = speed.compare_speed(times[first], times[again], times[name])
            results[name]["ratios"] = ratios
    numbers = {"prompt": prompt, "steps": steps, "batch": batch, "rounds": rounds}
    return {**numbers, "models": results}
