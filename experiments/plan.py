"""The numbers that fix what a run of the sweep computes."""

import dataclasses

import jaxprune as jp


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers that one seed's stages need; see `scaled_down_llm.Config`.

    Attributes:
      batch_size: sequences in a batch.
      steps: steps of training.
      retrain_steps: steps after pruning, and of the control.
      learning_rate: peak, of both.
      criteria: names of `CRITERIA`, each pruned by.
      retrain_criteria: those retrained after it.
      scopes: "layer", "global".
      sparsities: the sweep.
      retrain_sparsities: those retrained at.
      eval_tokens: validation tokens of every loss; None for all.
      show_sparsity: where samples and single weights are shown.
      sample_length: characters of a sample.
      checkpoint_every: steps between checkpoints.
      energy_country: three-letter code, or None for no energy.
    """

    batch_size: int
    steps: int
    retrain_steps: int
    learning_rate: float
    criteria: tuple[str, ...]
    retrain_criteria: tuple[str, ...]
    scopes: tuple[jp.base.Scope, ...]
    sparsities: tuple[float, ...]
    retrain_sparsities: tuple[float, ...]
    eval_tokens: int | None
    show_sparsity: float
    sample_length: int
    checkpoint_every: int
    energy_country: str | None
