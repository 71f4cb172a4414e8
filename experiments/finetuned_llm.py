"""Fine-tune a language model that others trained, watch every weight, prune, retrain.

    python -m experiments.finetuned_llm MODEL_DIR --text FILE --foreign FILE --out OUT

The main experiment on real ground: any directory that `jaxprune.lm.models.hf.load`
reads, fine-tuned on a text, pruned by what was seen meanwhile, and measured on the end
of that text and on a foreign one, which says what was forgotten. Started again with the
same flags, a run continues where it was; a finished one says so. What it writes is
described in experiments/README.md.
"""

import contextlib
import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jax.sharding import Mesh

import jaxprune as jp
from experiments.datasets import load
from experiments.datasets.text import read_text
from experiments.harness import device_mesh, runner, solvers
from experiments.harness.option_rules import at_least
from experiments.harness.plan import Plan
from experiments.harness.task import Looks
from experiments.tasks import model_directory, tiny_directory
from experiments.tasks.finetuning import TABLES, DecoderModel, FinetuningTask, Texts
from jaxprune.arrays import rules
from jaxprune.arrays.low_bit import Storage
from jaxprune.arrays.rules import Rule
from jaxprune.files import atomic
from jaxprune.lm.models import hf

# Enough for the windows of every part.
_SMOKE_CHARACTERS = 40_000
_README = Path(__file__).with_name("README.md")

_OPTIONS = (
    Rule(
        lambda v: v.model is not None or v.smoke,
        "finetuned_llm needs a model: give MODEL_DIR, a Hugging Face directory as "
        "`python -m benchmarks.gemma MODEL_DIR` writes one, or --smoke",
    ),
    Rule(
        lambda v: len(v.foreign) > 0,
        "finetuned_llm needs a text to forget: give --foreign FILE of another kind "
        "than the text it is fine-tuned on",
    ),
    *(
        at_least(name, 1)
        for name in ("sequence", "looks", "calibration", "sample_length")
    ),
    rules.within(
        *("eval_tokens", 0, math.inf), "eval_tokens must be >= 0, got {eval_tokens}"
    ),
)
# Files of one name would be one column of the tables.
_WINDOW = Rule(
    lambda v: v.tokens >= v.window,
    "{text} must have a window of {window} tokens, got {tokens}",
    "{way_out}, or a smaller --sequence",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tunes a checkpoint directory with tracking, prunes it, retrains it.

    Attributes:
      model: a Hugging Face directory with a tokenizer.json, as `benchmarks.gemma`
        writes one; with --smoke a tiny one is made if it is left out.
      text: UTF-8 files, or directories of them, to fine-tune on; the last tenth of each
        is held out.
      foreign: others, measured on alone: how much of them the model forgets.
      out: directory of the results; a run found there continues.
      data: a data set in place of `text`: "shakespeare_plays" (offline) or
        "tiny_shakespeare_char".
      data_dir: where data sets are kept; TFDS's default if left out.
      seeds: one fine-tuning each; a seed draws the batches.
      criteria: what to prune by; see experiments/harness/criteria.py, and
        SOLVER_ALLOCATION as "sparsegpt_preconditioned_magnitude",
        experiments/harness/solvers.py.
      retrain_criteria: those retrained too; all of `criteria` if left out.
      allocations: "global" ranks all matrices together, "layer" each alone; the first
        one is retrained. A solver has its own.
      sparsities: fractions of the decoder's matrices to remove.
      retrain_sparsities: those retrained at; all of `sparsities` if left out.
      sequence: tokens of a sequence.
      batch_size: sequences in a batch.
      steps: steps of fine-tuning.
      retrain_steps: steps after pruning, and of the dense control; 0 for neither.
      learning_rate: peak.
      retrain_learning_rate: peak of the steps after pruning; that of fine-tuning if
        left out.
      eval_tokens: tokens of every loss, of the held-out text and of each foreign one; 0
        takes all.
      looks: how often the held-out loss is measured while fine-tuning.
      calibration: sequences of the training text that a solver sees.
      train_tables: trains the tables of the vocabulary and the positions too, which
        else are left as they are.
      storage: what averages are held in, 4, 2 or 1 bytes a weight.
      checkpointing: whether activations inside a layer are made again for the gradient,
        for less memory.
      dtype: type of the matrix products; parameters are float32.
      show_sparsity: where samples, layers and single weights are shown.
      sample_length: tokens of a sample.
      checkpoint_every: steps between checkpoints.
      energy: three-letter code of the country whose electricity counts, to measure
        energy and CO2 (needs the extra `energy`).
      mesh: how the devices share the work, "data=4,model=2" or "fsdp=8"; see
        experiments/harness/device_mesh.py. All that the batch can be split over if
        left out.
      smoke: everything at a size that ends within a minute.
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    text: tuple[Path, ...] = ()
    foreign: tuple[Path, ...] = ()
    out: Path = Path("results/finetuned_llm")
    data: str = "shakespeare_plays"
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0, 1)
    criteria: tuple[str, ...] = (
        *(
            "preconditioned_magnitude",
            "preconditioned_adam",
            "averaged_weight",
            "movement",
            "magnitude",
        ),
        *("sparsegpt_uniform", "sparsegpt_preconditioned_magnitude"),
    )
    retrain_criteria: tuple[str, ...] | None = None
    allocations: tuple[Literal["layer", "global"], ...] = ("global",)
    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5, 0.6)
    retrain_sparsities: tuple[float, ...] | None = None
    sequence: int = 512
    batch_size: int = 1
    steps: int = 300
    retrain_steps: int = 30
    learning_rate: float = 5e-5
    retrain_learning_rate: float | None = None
    eval_tokens: int = 4096
    looks: int = 10
    calibration: int = 32
    train_tables: bool = False
    storage: Storage = "bfloat16"
    checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    show_sparsity: float = 0.5
    sample_length: int = 40
    checkpoint_every: int = 100
    energy: str | None = None
    mesh: str | None = None
    smoke: bool = False

    def smaller(self) -> "Config":
        """The same at the size of `--smoke`."""
        # One criterion of each sort: of averages, of the start alone, and a solver's.
        solver = [name for name in self.criteria if solvers.named(name)][-1:]
        return dataclasses.replace(
            self,
            foreign=self.foreign or (_README,),
            seeds=self.seeds[:1],
            criteria=tuple(dict.fromkeys((*self.criteria[:1], "movement", *solver))),
            retrain_criteria=None,
            sparsities=(0.25, 0.6),
            retrain_sparsities=(0.6,),
            sequence=min(self.sequence, 32),
            batch_size=4,
            steps=20,
            retrain_steps=10,
            eval_tokens=2048,
            calibration=4,
            sample_length=20,
        )

    def plan(self) -> Plan:
        """The numbers of one seed, checked.

        Raises:
          ValueError: a criterion is unknown, or a number is out of range.
        """
        self._check()
        return Plan.of(
            self,
            solvers=True,
            batch_size=self.batch_size,
            steps=self.steps,
            learning_rate=self.learning_rate,
            # The rate of fine-tuning is low already, so retraining needs no lower one.
            retrain_learning_rate=self.retrain_learning_rate or self.learning_rate,
            eval_tokens=self.eval_tokens or None,
            sample_length=self.sample_length,
        )

    def _check(self) -> None:
        """Refuses what `Plan` does not know of."""
        rules.check(_OPTIONS, **vars(self))


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, the model is not understood, a text
        is too short, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
      FloatingPointError: a loss is not finite.
    """
    small = config.smaller() if config.smoke else config
    plan = small.plan()
    mesh = device_mesh.make_mesh(config.mesh, plan.batch_size)
    with _directory(config) as directory:
        # Results written into the model's directory would change its fingerprint.
        atomic.apart(config.out, directory)
        model = model_directory.opened(directory, mesh)
        texts = _texts(small, model.tokenizer)
        task = _task(small, model, texts, mesh)
        identity = runner.identity_of(
            config,
            plan,
            weights=model_directory.fingerprint(directory),
            texts=_texts_fingerprint(texts),
            **{
                name: getattr(small, name)
                for name in ("sequence", "looks", "calibration", "train_tables")
            },
            storage=config.storage,
        )
        if mesh is not None:
            # Refuses a mesh that splits nothing before the run's directory is made.
            device_mesh.shardings(task.shapes, mesh)

        def more(seeds: list[dict[str, Any]]) -> dict[str, Any]:
            return {"model": runner.described(task, jp.tree.prunable)}

        return runner.sweep("finetuned_llm", config, plan, task, identity, mesh, more)


@contextlib.contextmanager
def _directory(config: Config) -> Iterator[Path]:
    """The model's directory, or a tiny one for as long as the run takes."""
    if config.model is not None:
        yield config.model
        return
    with tempfile.TemporaryDirectory() as place:
        yield tiny_directory.write(Path(place) / "model")


def _texts(config: Config, tokenizer: hf.Tokenizer) -> Texts:
    """Reads and tokenises what is trained and measured on.

    Raises:
      ValueError: a text cannot be read, or is shorter than a window.
    """
    most = _SMOKE_CHARACTERS if config.smoke else None

    def tokens(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text[:most], bos=False), np.int32)  # (length,)

    corpora = [
        load(config.data, text=path, data_dir=config.data_dir)
        for path in config.text or (None,)
    ]
    train, held_out = (
        tokens(
            "\n".join(
                corpus.vocabulary.decode(getattr(corpus, part)) for corpus in corpora
            )
        )
        for part in ("train", "validation")
    )
    foreign = {path.stem: tokens(read_text(path)) for path in config.foreign}
    if len(foreign) != len(config.foreign):
        raise ValueError("--foreign files must have different names; rename one")
    window = config.sequence + 1  # inputs, and a target for the last of them
    # All texts are looked at before the first step: a foreign text is first measured
    # hours later.
    for name, ids, way_out in (
        ("what is trained on", train, "give more --text"),
        ("what is held out, the last tenth of --text,", held_out, "give more --text"),
        *(
            (f"the foreign text '{k}'", x, "give a longer --foreign")
            for k, x in foreign.items()
        ),
    ):
        values = {"text": name, "tokens": len(ids), "way_out": way_out}
        rules.check([_WINDOW], window=window, **values)
    return Texts(train, held_out, foreign)


def _task(
    config: Config,
    model: model_directory.ModelDirectory,
    texts: Texts,
    mesh: Mesh | None,
) -> FinetuningTask:
    """The model and its texts.

    Raises:
      ValueError: the model's context is shorter than a sequence.
    """
    shape = model.config
    highest = max(int(ids.max()) for ids in (texts.train, texts.held_out))
    if not shape.context >= config.sequence:
        raise ValueError(
            f"the model sees at most {shape.context} tokens, got --sequence "
            f"{config.sequence}; give {shape.context} or less"
        )
    if not highest < shape.vocab_size:
        raise ValueError(
            f"the model has {shape.vocab_size} tokens, but its tokenizer gave "
            f"{highest}; bring back the tokenizer.json that belongs to it"
        )
    size = device_mesh.batch_size(config.batch_size, mesh)
    return FinetuningTask(
        DecoderModel(
            shape.with_dtype(config.dtype), model.read, remat=config.checkpointing
        ),
        model.tokenizer,
        texts,
        config.sequence,
        # "All" tokens would make each look at the curve as long as the final
        # evaluation.
        Looks(size, config.looks, config.eval_tokens or 16_384),
        foreign_tokens=config.eval_tokens or None,
        calibration=config.calibration,
        frozen=() if config.train_tables else TABLES,
        storage=config.storage,
        write=model.write,
    )


def _texts_fingerprint(texts: Texts) -> str:
    """SHA-256 of all tokens, and which are for what."""
    digest = hashlib.sha256()
    # In order, because a foreign text may be called "train".
    splits = [("train", texts.train), ("held out", texts.held_out)]
    for name, tokens in (*splits, *texts.foreign.items()):
        digest.update(f"{name} {len(tokens)} ".encode() + tokens.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    runner.from_command_line(main, Config)
