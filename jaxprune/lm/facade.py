"""Language models in Python: each step takes a model and gives a model.

A model is a directory, as `transformers` reads it, so models larger than memory go
through every step leaf by leaf, steps chain in any order, and a step that was killed
goes on where it was when it is called again with the same `out`.
"""

import contextlib
import dataclasses
import io
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxprune.arrays.messages import columns
from jaxprune.files import atomic
from jaxprune.lm.checkpoints import rewrite
from jaxprune.lm.checkpoints.checkpoint_dir import open_directory
from jaxprune.lm.measure.tables import format_bits, format_perplexity
from jaxprune.lm.steps import provenance, speed
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.evaluate import EvaluateJob
from jaxprune.lm.steps.packing import Packing
from jaxprune.lm.steps.settings import (
    Dtype,
    Job,
    Loading,
    PruneJob,
    Pruning,
    RecoverJob,
    Removal,
    ShrinkJob,
    Trained,
    Training,
    TrimJob,
)
from jaxprune.lm.steps.skeleton import run_job
from jaxprune.lm.torch_models import choosing
from jaxprune.posttraining.passes import Pass
from jaxprune.posttraining.passes.chaining import as_chain
from jaxprune.posttraining.passes.efforts import Effort

PathLike = str | Path


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in a directory or a compact file, and how it is read.

    Attributes:
      path: path of the directory or the file.
      loading: how it is read.
      progress: whether steps show bars and notes on stderr.
    """

    path: Path
    loading: Loading = dataclasses.field(default_factory=Loading)
    progress: bool = True
    # A result that nobody gave a place lives as long as its model.
    _place: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def record(self) -> dict[str, Any]:
        """What jaxprune.json says of how it was made; {} for a model as it came."""
        if not (self.path / rewrite.NAME).is_file():
            return {}
        return rewrite.read_provenance(self.path)


class Texts(NamedTuple):
    """Texts that show what a model is for.

    Attributes:
      files: paths of the texts, and "self" for what the model writes.
      options: options of `texts` that were given, by name.
    """

    files: tuple[Path, ...]
    options: dict[str, Any]


def open(
    path: PathLike,
    *,
    dtype: Dtype | None = None,
    bos: bool | None = None,
    ignore_config: Collection[str] = (),
    mesh: str | None = None,
    progress: bool = True,
) -> Model:
    """A model in a directory or a compact file; no weight is read yet.

    Args:
      path: directory of config.json, *.safetensors and tokenizer.json, or a file of
        `jaxprune compact`.
      dtype: dtype of parameters and products; as they are stored if left out.
      bos: whether each sequence of a text begins with the BOS token; as the directory
        says if left out.
      ignore_config: attributes of config.json to read as if they were not there.
      mesh: devices to run on, "data=2,fsdp=4" say.
      progress: whether steps show bars and notes on stderr.

    Returns:
      The model.

    Raises:
      ValueError: it is neither.
    """
    path = Path(path)
    if not path.is_file():
        open_directory(path)  # refuses what is no model
    loading = Loading(
        dtype=dtype,
        bos=None if bos is None else ("yes" if bos else "no"),
        ignore_config=tuple(ignore_config),
        mesh=mesh,
    )
    return Model(path, loading, progress)


def texts(
    *files: PathLike,
    tokens: int | None = None,
    sequences: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    evaluate: Collection[PathLike] = (),
) -> Texts:
    """Texts to calibrate on, to train on and to measure by; read by each step.

    Args:
      *files: paths of .txt, .md, .jsonl, .parquet, or .npy of int32 token ids
        (sequences, length); "self" is what the model writes itself. Several are a
        mixture with as many sequences of each.
      tokens: tokens that are taken, in place of `sequences`.
      sequences: sequences that are taken: 64 to prune, 32 to shrink, 256 to recover if
        left out.
      length: tokens of a sequence: 512, to shrink 256, if left out.
      seed: decides which sequences are drawn; 0 if left out.
      batch: sequences that the model sees at once: 4, to recover 1, if left out.
      evaluate: texts to measure by, before and after a step; if left out the last
        tenth of each text, which then is not taken.

    Returns:
      The texts.
    """
    if tokens is not None and sequences is not None:
        raise ValueError(
            f"texts takes tokens or sequences, got {tokens} and {sequences}; give one"
        )
    if tokens is not None:
        length = length or 512
        sequences = max(1, tokens // length)
    options = {"sequences": sequences, "length": length, "seed": seed, "batch": batch}
    given: dict[str, Any] = {n: v for n, v in options.items() if v is not None}
    return Texts(
        tuple(map(Path, files)), given | {"evaluate": tuple(map(Path, evaluate))}
    )


def prune(
    model: Model,
    texts: Texts | None = None,
    *,
    sparsity: float | None = None,
    effort: Effort | None = None,
    passes: Pass | str | None = None,
    exclude: Collection[str] = (),
    out: PathLike | None = None,
) -> Model:
    """A model with zeros, of the same shapes.

    Args:
      model: model that is pruned.
      texts: texts that show what it is for; what the model writes itself if left out.
      sparsity: share of the weights to remove, in [0, 1); None where the pattern of
        `passes` fixes it.
      effort: "quick", "good" or "best", in place of `passes`.
      passes: a method's name, a pass of `jp.passes` or a chain of them.
      exclude: globs on the names of tensors to leave alone.
      out: directory to write; a scratch directory if left out.

    Returns:
      The pruned model; its `record` says what was done and measured.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    chain = None if passes is None else as_chain(passes)
    pruning = Pruning(effort=effort, sparsity=sparsity, exclude=tuple(exclude))
    if chain is not None:
        pruned = chain.pruning
        share: Any = pruned.sparsity if sparsity is None else sparsity
        method: Any = type(pruned).__name__.lower()
        pruning = dataclasses.replace(
            pruning, passes=chain, sparsity=share, method=method
        )
    return _step(PruneJob, model, texts, out, pruning=pruning)


def shrink(
    model: Model,
    texts: Texts | None = None,
    *,
    ffn: float = 0.0,
    multiple: int = 1,
    heads: float = 0.0,
    experts: float = 0.0,
    layers: int | Sequence[int] = (),
    budget: float | None = None,
    out: PathLike | None = None,
) -> Model:
    """A smaller model: fewer layers, experts, heads and neurons.

    Args:
      model: model that is made smaller.
      texts: texts that show what it is for; without, the weights alone decide.
      ffn: share of the neurons of each MLP to remove.
      multiple: number that the neurons of a layer are a multiple of afterwards.
      heads: share of the key heads to remove, each with all query heads of it.
      experts: share of the experts of each layer to remove.
      layers: number of layers that stay, or the numbers of those that do.
      budget: share of the parameters that may be left, in place of all others.
      out: directory to write; a scratch directory if left out.

    Returns:
      The smaller model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    kept = (layers,) if isinstance(layers, int) else tuple(layers)
    removal = Removal(
        ffn=ffn,
        multiple=multiple,
        heads=heads,
        experts=experts,
        layers=kept,
        budget=budget,
    )
    return _step(ShrinkJob, model, texts, out, removal=removal)


def trim(
    model: Model, texts: Texts, *, tokens: int, out: PathLike | None = None
) -> Model:
    """A model with fewer tokens: a smaller embedding, head and tokenizer.

    Args:
      model: model whose vocabulary is made smaller.
      texts: texts whose tokens stay.
      tokens: number of tokens that stay, a multiple of 64.
      out: directory to write; a scratch directory if left out.

    Returns:
      The smaller model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    return _step(TrimJob, model, texts, out, tokens=tokens)


def recover(
    model: Model,
    texts: Texts,
    *,
    teacher: Model | None = None,
    steps: int = Training.steps,
    train: Trained | None = None,
    learning_rate: float | None = None,
    text_share: float = 0.0,
    out: PathLike | None = None,
) -> Model:
    """A pruned or smaller model, trained on; its zeros stay zeros.

    Args:
      model: model that is trained.
      texts: texts that are trained on; "self" is written by the teacher.
      teacher: model whose predictions are followed; the texts themselves are learned if
        left out.
      steps: steps of AdamW.
      train: "all", "matrices", "norms" or "lora": what is trained.
      learning_rate: highest learning rate; for each tensor by its size if left out.
      text_share: share of the loss that is learning the texts, beside a teacher.
      out: directory to write; a scratch directory if left out.

    Returns:
      The trained model.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    training = Training(
        steps=steps,
        teacher=None if teacher is None else teacher.path,
        train=train,
        learning_rate=learning_rate,
        text_share=text_share,
    )
    return _step(RecoverJob, model, texts, out, training=training)


class Results(NamedTuple):
    """What was measured of some models; prints as a table.

    Attributes:
      models: path of each model to its results: "texts" by name, "bytes", and where it
        was asked for, "tokens_a_second".
    """

    models: dict[str, dict[str, Any]]

    def __str__(self) -> str:
        """A row for each model and text."""
        rows = [["model", "text", "perplexity", "bits/byte", "bytes", "tokens/s"]]
        for name, result in self.models.items():
            speed = result.get("tokens_a_second")
            last = [f"{result['bytes']:,}", "-" if speed is None else f"{speed:,.1f}"]
            for text, of in result["texts"].items():
                shown = format_perplexity(of["perplexity"])
                rows.append(
                    [name, text, shown, format_bits(of["bits_per_byte"]), *last]
                )
        return columns(rows, right=True)


def evaluate(
    models: Model | Sequence[Model], texts: Texts, *, speed: bool = False
) -> Results:
    """The perplexity and size of models, side by side.

    Args:
      models: models, one after the other in memory.
      texts: texts; those to `evaluate` where it names some, or all else whole.
      speed: whether to time decoding too, all models in memory together.

    Returns:
      The results, which print as a table.

    Raises:
      ValueError: a model or a text does not fit.
    """
    given = [models] if isinstance(models, Model) else [*models]
    files = texts.options["evaluate"] or texts.files
    results = {}
    for model in given:
        with _console(model) as console:
            job = EvaluateJob(model=model.path, text=files, loading=model.loading)
            measured = choosing.evaluate(job, console)
        size = sum(path.stat().st_size for path in _weights(model.path))
        results[str(model.path)] = {**measured, "bytes": size}
    if speed:
        for name, rate in _decoding_speeds(given).items():
            results[name]["tokens_a_second"] = rate
    return Results(results)


def save(model: Model, out: PathLike, *, overwrite: bool = False) -> Model:
    """Copies a model's directory, with its record and report, to a place of its own.

    Args:
      model: model that is kept.
      out: directory to write.
      overwrite: whether an earlier result there may be replaced.

    Returns:
      The model there.

    Raises:
      ValueError: the place is taken.
    """
    place = atomic.apart(out, model.path)
    atomic.check_free(place, rewrite.why_not_ours if overwrite else None)
    atomic.check_room(place, atomic.bytes_in(model.path))
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model.path, partial)
    if place.exists():
        shutil.rmtree(place)
    partial.rename(place)
    return dataclasses.replace(model, path=place, _place=None)


def _step(
    job_class: Any,
    model: Model,
    texts: Texts | None,
    out: PathLike | None,
    **groups: Any,
) -> Model:
    """Does a step, or finds that the same one is done."""
    place = None
    if out is None:
        place = _Scratch()
        out = place.path / "model"
    calibration: Any = job_class.__dataclass_fields__["calibration"].default_factory()
    if texts is not None:
        calibration = dataclasses.replace(
            calibration, calibration=texts.files, **texts.options
        )
    job: Job = job_class(
        model=model.path,
        out=Path(out),
        calibration=calibration,
        loading=model.loading,
        **groups,
    )
    command = f"jaxprune.lm, {job}"
    if not provenance.is_done(job.out, command):
        with _console(model) as console:
            run_job(choosing.prepare_step, job, console, command)
    return dataclasses.replace(model, path=job.out, _place=place)


class _Scratch:
    """A directory that goes with its last model."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="jaxprune-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@contextlib.contextmanager
def _console(model: Model) -> Iterator[Console]:
    """Where a step speaks: its notes and bars on stderr, its result as a value."""
    console = Console(quiet=True)
    if model.progress:
        yield console
        return
    console.silence()
    with contextlib.redirect_stderr(io.StringIO()):  # bars too
        yield console


def _weights(path: Path) -> list[Path]:
    return [path] if path.is_file() else [*path.glob("*.safetensors")]


def _decoding_speeds(models: Sequence[Model]) -> dict[str, float]:
    """Path of each model to the tokens a second that it decodes."""
    loading = models[0].loading
    with _console(models[0]) as console:
        paths = [model.path for model in models]
        candidates = speed.read_candidates(paths, loading, Packing(), 1, console)
        timed = speed.time_candidates(
            candidates, prompt=256, steps=32, batch=1, rounds=5
        )
    return {name: of["decode"] for name, of in timed["models"].items()}
