"""JaxPruner's methods under the protocol of `experiments.prune_while_training`.

    python -m benchmarks.jax_pruning_methods --source PATH --out DIR ...

The flags but `--source` are the experiment's, and its cells may lie in the same
directory. JaxPruner (google-research/jaxpruner) is read from a checkout; it needs
ml_collections. It is no dependency, and nothing of it is copied. It needs two repairs
today, which are made from outside: `jax.tree_map`, which jax has removed, is defined
again; and it leaves None, a leaf without a mask, as it is, else SET and RigL fail.

JaxPruner's training loop has a hook before the forward pass and one after the update.
Here both hooks are called inside the update. The parameters that the experiment holds
are those that JaxPruner's forward pass would see; JaxPruner's own parameters, dense or
not, are in the optimizer's state.
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import prune_while_training
from experiments.harness import runner
from experiments.harness.optimizer import optimizer
from experiments.prune_while_training.methods import METHODS, Method, Span, late


@dataclasses.dataclass(frozen=True)
class Config(prune_while_training.Config):
    """Runs JaxPruner's methods beside ours.

    Attributes:
      source: a checkout of google-research/jaxpruner; an installed one if left out.
    """

    source: Path | None = None


class State(NamedTuple):
    """Their parameters and their state."""

    params: Any
    inner: Any


def wrapped(updater: Any, inner: optax.GradientTransformation) -> Any:
    """One of their updaters as an optax transformation, its two hooks inside."""
    # Its masks and counts are in this state; the hooks read them from there.
    tx = updater.wrap_optax(inner)

    def init(params: Any) -> State:
        return State(jax.tree.map(jnp.array, params), tx.init(params))

    def update(gradient: Any, state: State, params: Any = None) -> tuple[Any, State]:
        updates, inner = tx.update(gradient, state.inner, state.params)
        params_held = optax.apply_updates(state.params, updates)
        params_held = updater.post_gradient_update(params_held, inner)
        visible = updater.pre_forward_update(params_held, inner)
        difference = jax.tree.map(
            # old + (new - old) need not be new in float32, and a zero must be a zero.
            lambda new, old: jnp.where(new == 0, -old, new - old),
            visible,
            params,
        )
        return difference, State(params_held, inner)

    return optax.GradientTransformation(init, update)


class Library:
    """JaxPruner as it is imported, and its methods in the form of `METHODS`.

    Attributes:
      jaxpruner: the package.
      distributions: its module of sparsity distributions.
    """

    def __init__(self, source: Path | None) -> None:
        """Imports the package.

        Raises:
          ImportError: there is no JaxPruner, or it cannot be imported.
        """
        if source is not None:
            sys.path.insert(0, str(source))  # before an installed one
        jax.tree_map = _tree_map
        self.jaxpruner = importlib.import_module("jaxpruner")
        self.distributions = importlib.import_module("jaxpruner.sparsity_distributions")

    def rising(self, name: str, **options: Any) -> Method:
        """A method whose sparsity rises along the cubic of the protocol."""
        kernels = self.distributions.KERNEL_FILTER_FN

        def build(rate: optax.ScalarOrSchedule, span: Span) -> Any:
            sparsity_options = {"sparsity": span.final, "filter_fn": kernels}
            # The global methods rank all kernels together and take a plain number.
            if not name.startswith("Global"):
                sparsity_options = self._shared_out("uniform", span)
            scheduler = self.jaxpruner.PolynomialSchedule(
                span.every, span.begin, span.end
            )
            updater = getattr(self.jaxpruner, name)(
                scheduler=scheduler, **sparsity_options, **options
            )
            return wrapped(updater, optimizer(rate, track=()))

        return build

    def sparse(self, name: str) -> Method:
        """A method that is sparse from the first step, by ERK."""

        def build(rate: optax.ScalarOrSchedule, span: Span) -> Any:
            schedule_options: dict[str, Any] = {}
            if name != "StaticRandomSparse":
                period = max(span.freeze // 30, 1)  # as ours: 2.5 % of the steps
                # Its update_state takes the first step for an update as well.
                scheduler = self.jaxpruner.PeriodicSchedule(period, period, span.freeze)
                fall = optax.cosine_decay_schedule(0.3, span.freeze)
                schedule_options = {"scheduler": scheduler, "drop_fraction_fn": fall}
            updater = getattr(self.jaxpruner, name)(
                **self._shared_out("erk", span), **schedule_options
            )
            return wrapped(updater, optimizer(rate, track=()))

        return build

    def _shared_out(self, name: str, span: Span) -> dict[str, Any]:
        """The option that gives each kernel its sparsity, by a rule of theirs."""
        distribution = functools.partial(
            getattr(self.distributions, name),
            sparsity=span.final,
            filter_fn=self.distributions.KERNEL_FILTER_FN,
        )
        return {"sparsity_distribution_fn": distribution}


def methods(source: Path | None) -> dict[str, Method]:
    """Their methods by name, at their own defaults where the protocol names none.

    Raises:
      ImportError: there is no JaxPruner, or it cannot be imported.
    """
    library = Library(source)
    dense_to_sparse = {
        "jaxpruner_magnitude": library.rising("MagnitudePruning"),
        "jaxpruner_global_magnitude": library.rising("GlobalMagnitudePruning"),
        "jaxpruner_saliency": library.rising("SaliencyPruning"),
        "jaxpruner_ste_magnitude": library.rising("SteMagnitudePruning"),
    }
    return {
        **dense_to_sparse,
        **{f"{name}_late": late(method) for name, method in dense_to_sparse.items()},
        "jaxpruner_static": library.sparse("StaticRandomSparse"),
        "jaxpruner_set": library.sparse("SET"),
        "jaxpruner_rigl": library.sparse("RigL"),
    }


def _tree_map(function: Callable[..., Any], tree: Any, *trees: Any) -> Any:
    """jax's of old, by which a leaf of None stays None."""

    def one(leaf: Any, *leaves: Any) -> Any:
        return None if leaf is None else function(leaf, *leaves)

    return jax.tree.map(one, tree, *trees, is_leaf=lambda leaf: leaf is None)


def main(config: Config) -> Path:
    """Runs the experiment with their methods known; returns the path of results.json.

    Raises:
      ImportError: there is no JaxPruner, or it cannot be imported.
      ValueError, OSError, FloatingPointError: as the experiment's own.
    """
    METHODS.update(methods(config.source))
    values = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(prune_while_training.Config)
    }
    return prune_while_training.main(prune_while_training.Config(**values))


if __name__ == "__main__":
    runner.from_command_line(main, Config)
