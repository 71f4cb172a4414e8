"""Further than the paper: prune while training, not after it.

    python -m experiments.prune_while_training --out results/prune_while_training

One run of as many steps as the main experiment spends on training and retraining
together. The sparsity rises along a cubic from 20 % to 60 % of the steps, ranked by
|w| times the fourth root of Adam's own second moment; what was pruned stays pruned. At
sparsity 0 the same recipe gives the dense control that it must be held against.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, Literal

import jax
import optax

import jaxprune as jp
from experiments import gpt
from experiments.datasets import Batches, load, prefetch, validation_batches
from experiments.harness import device_mesh, runner, training
from experiments.harness.stages import once
from experiments.tasks.language_model import (
    LanguageModel,
    keep_everything,
    optimizer,
    schedule,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains with a rising sparsity, and dense by the same recipe.

    Attributes:
      out: directory of the results; a run found there continues.
      preset: size of the model.
      data: "shakespeare_plays" (offline) or "tiny_shakespeare_char".
      text: a text file, or a directory of them, in place of a data set.
      data_dir: where data sets are kept.
      seeds: one run each, for each sparsity.
      sparsities: final fractions of the decoder's matrices removed; 0 is the control.
      recipe: "cosine" is one cosine over all steps; "restart" is the main experiment's
        schedule, a cosine and a second, short one.
      learning_rate: the peak.
      steps: steps in all.
      restart: how many of them are the second cosine's.
      prune_every: steps between two prunings.
      distill: weight of the divergence from the dense model by the same recipe and
        seed, in [0, 1); 0 for none.
      batch_size: sequences in a batch.
      eval_tokens: validation tokens of every loss; 0 takes all.
      mesh: how the devices share the work, as in `scaled_down_llm`.
    """

    out: Path = Path("results/prune_while_training")
    preset: Literal["cpu", "medium", "char"] = "cpu"
    data: str = "shakespeare_plays"
    text: Path | None = None
    data_dir: Path | None = None
    seeds: tuple[int, ...] = (0,)
    sparsities: tuple[float, ...] = (0.0, 0.6, 0.8)
    recipe: Literal["cosine", "restart"] = "cosine"
    learning_rate: float = 2e-3
    steps: int = 2500
    restart: int = 500
    prune_every: int = 50
    distill: float = 0.0
    batch_size: int = 12
    eval_tokens: int = 0
    mesh: str | None = None

    def rate(self) -> optax.Schedule:
        """The learning rate by step."""
        if self.recipe == "cosine":
            return schedule(self.learning_rate, self.steps, warmup=100)
        first = self.steps - self.restart
        return optax.join_schedules(
            [
                schedule(self.learning_rate, first, warmup=100),
                schedule(self.learning_rate, self.restart, warmup=50),
            ],
            [first],
        )

    def targets(self, final: float) -> dict[int, float]:
        """Step to the sparsity that it begins with, the cubic of Zhu and Gupta."""
        for name, share in (("sparsities", final), ("distill", self.distill)):
            if not 0 <= share < 1:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        begin, end = round(0.2 * self.steps), round(0.6 * self.steps)
        steps = [*range(begin + self.prune_every, end, self.prune_every), end]
        rest = [(end - step) / (end - begin) for step in steps]
        return {
            step: final * (1 - left**3) for step, left in zip(steps, rest, strict=True)
        }


def pruned(state: training.TrainState, sparsity: float) -> training.TrainState:
    """The state pruned to a sparsity; its moments are kept."""
    importance = jp.get_importance(state.opt_state)
    scores = jp.scores.trajectory(state.params, importance)
    masks = jp.masks.make(scores, sparsity, allocation="global")
    return state._replace(
        params=jp.masks.apply(state.params, masks),
        opt_state=state.opt_state._replace(masks=masks),
    )


def distilled(
    model: LanguageModel,
    teacher: Any,
    weight: float,
    params: Any,
    inputs: jax.Array,
    targets: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Cross entropy mixed with the divergence from a teacher (Hinton et al., 2015)."""
    loss = model.loss(params, inputs, targets, key)
    student = jax.nn.log_softmax(model.bind(params)(inputs))
    taught = jax.nn.log_softmax(model.bind(teacher)(inputs))
    divergence = optax.losses.kl_divergence_with_log_targets(student, taught).mean()
    return (1 - weight) * loss + weight * divergence


def run(
    config: Config, model: LanguageModel, batches: Batches, seed: int, final: float
) -> Any:
    """The parameters after one run, from its segments' checkpoints where there are."""
    params, loss = model.init(seed), model.loss
    if config.distill and final:
        teacher = run(config, model, batches, seed, 0.0)
        loss = functools.partial(distilled, model, teacher, config.distill)
    tx = jp.keep_masks(optimizer(config.rate(), track=()), keep_everything(params))
    step_fn = training.make_step(loss, tx)
    mesh = device_mesh.make_mesh(config.mesh, config.batch_size)
    state = training.init(params, tx, mesh=mesh)
    segments = config.out / f"seed-{seed}" / f"{final:g}"
    targets = config.targets(final) if final else {}
    for stop in [*targets, config.steps]:
        state = training.train(
            state,
            step_fn,
            batches,
            steps=stop,
            key=jax.random.key(seed),
            checkpoints=training.Checkpoints(
                segments / str(stop), {"seed": seed, "sparsity": final, "stop": stop}
            ),
            label=f"seed {seed}, {final:.0%} removed",
            mesh=mesh,
            prefetch=prefetch,
        )
        if stop in targets:
            state = pruned(state, targets[stop])
    return state.params


def main(config: Config) -> Path:
    """Runs the experiment, or what is left of it; returns the path of results.json.

    Raises:
      ValueError: the configuration is out of range, or the directory holds another run.
      OSError: the directory cannot be written to, or another process runs there.
    """
    for final in config.sparsities:
        config.targets(final)
    mesh = device_mesh.make_mesh(config.mesh, config.batch_size)
    corpus = load(config.data, text=config.text, data_dir=config.data_dir)
    identity = dataclasses.asdict(config) | {"fingerprint": corpus.fingerprint}
    for name in ("out", "text", "data_dir", "seeds", "sparsities", "mesh"):
        del identity[name]
    shape = gpt.preset(config.preset, vocab_size=len(corpus.vocabulary))
    model = LanguageModel(shape)
    evaluate = training.make_eval(model.token_losses, mesh=mesh)
    windows = validation_batches(
        corpus.validation,
        device_mesh.batch_size(64, mesh),
        shape.context,
        config.eval_tokens or None,
    )

    def loss(seed: int, final: float) -> float:
        cell = config.out / f"seed-{seed}" / f"{final:g}"
        batches = Batches(corpus.train, config.batch_size, shape.context, seed)

        def compute() -> dict[str, float]:
            params = run(config, model, batches, seed, final)
            return {"loss": evaluate(params, windows)}

        found = once(cell.with_name(f"{cell.name}.json"), compute)["loss"]
        if final or not config.distill:  # the teacher is needed again
            shutil.rmtree(cell, ignore_errors=True)
        print(f"seed {seed}  {final:4.0%} removed  {found:.4f} nats", flush=True)
        return found

    def cells() -> dict[str, Any]:
        finals = config.sparsities
        losses = {
            str(seed): {f"{final:g}": loss(seed, final) for final in finals}
            for seed in config.seeds
        }
        return {"losses": losses}

    return runner.run(
        "prune_while_training",
        config,
        identity,
        cells,
        lambda results, out: f"written to '{out}'",
        grows=True,
    )


if __name__ == "__main__":
    runner.from_command_line(main, Config)
