"""Criteria: pure functions from importance and parameters to scores; higher is kept.

Every criterion is `criterion(params, importance, *, prunable=...)`, so that any of them
can be handed on as a value; those that need no statistics ignore `importance`, which is
an `Importance`, the state of an optimizer, or an `nnx.Optimizer`.
Scores are float32, whatever the parameters' dtype (a float64 weight under 1e-38 scores
0; `masks.make` takes float64 scores of your own); units do not matter, since only the
order counts. Leaves that may not be pruned become `optax.MaskedNode()`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from optax import MaskedNode

from jaxprune import leaves
from jaxprune.arrays import lazy, placement, tree
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import is_between
from jaxprune.scores import formulas
from jaxprune.scores.importance import is_state, tracked
from jaxprune.typing import Params, PrunableLike, Scores


def magnitude(
    params: Params, importance: Any = None, *, prunable: PrunableLike = leaves.prunable
) -> Scores:
    """The size of the final weight: |w|.

    Args:
      params: the parameters.
      importance: averages, which are not read; may be None.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.scores.magnitude({"w": jnp.array([[1.0, -2.0]])})["w"].tolist()
      [[1.0, 2.0]]

    Reference:
      Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
      2015, arXiv 1506.02626.
    """
    return _score(formulas.size_of_weight, params, prunable)


def averaged_weight(
    params: Params, importance: Any = None, *, prunable: PrunableLike = leaves.prunable
) -> Scores:
    """The paper's criterion: the size of the weight's average over training, |A|.

    A weight that changed sign while it was learned scores low, however large it ended.

    Args:
      params: the parameters; names and shapes are read, values are not.
      importance: averages with `weight`, from `track_importance`.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Raises:
      ValueError: the average was not tracked, or is another model's.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[1.0, -2.0]])}
      >>> jp.scores.averaged_weight(w, jp.Importance(weight=w))["w"].tolist()
      [[1.0, 2.0]]

    Reference:
      Islam, Belhaouari, Bermak, "Systematic Weight Evaluation for Pruning Large
      Language Models", 2025, arXiv 2502.17071.
    """
    return _score(formulas.size_of_average, params, prunable, importance, "weight")


def averaged_magnitude(
    params: Params, importance: Any = None, *, prunable: PrunableLike = leaves.prunable
) -> Scores:
    """The average of the weight's size over training, E|w|.

    Args:
      params: the parameters; names and shapes are read, values are not.
      importance: averages with `magnitude`, from
        `track_importance(average=("magnitude",))`.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Raises:
      ValueError: it was not tracked, or is another model's.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[1.0, 2.0]])}
      >>> scores = jp.scores.averaged_magnitude(w, jp.Importance(magnitude=w))
      >>> scores["w"].tolist()
      [[1.0, 2.0]]
    """
    return _score(formulas.statistic_alone, params, prunable, importance, "magnitude")


def obd(
    params: Params, importance: Any = None, *, prunable: PrunableLike = leaves.prunable
) -> Scores:
    """Optimal brain damage with the empirical Fisher as diagonal: w^2 E[g^2].

    The rise of the loss in the second-order model whose Hessian is diagonal and equal
    to the mean squared gradient (the factor 1/2 is left out).

    Args:
      params: the parameters.
      importance: averages with `square`, tracked or from an adaptive optimizer; before
        the first step all score 0.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Raises:
      ValueError: there are no squared gradients, or they are another model's.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[1.0, -2.0]])}
      >>> squares = {"w": jnp.array([[16.0, 1.0]])}
      >>> jp.scores.obd(w, jp.Importance(square=squares))["w"].tolist()
      [[16.0, 4.0]]

    Reference:
      LeCun, Denker, Solla, "Optimal Brain Damage", 1989, equation 5.
    """
    return _score(formulas.brain_damage, params, prunable, importance, "square")


def preconditioned_magnitude(
    params: Params,
    importance: Any = None,
    *,
    exponent: float = 0.25,
    prunable: PrunableLike = leaves.prunable,
) -> Scores:
    """The default criterion: |w| E[g^2]^(1/4).

    The geometric mean of magnitude and of OBD's square root. OBD's E[g^2] is a noisy
    estimate of a curvature, so its exponent is halved here. Exponent 0 is magnitude and
    1/2 ranks as OBD; docs/results/records/default_criterion.toml says why 1/4. With
    `params=importance.weight` it is the averaged weight that is ranked.

    Args:
      params: the parameters.
      importance: averages with `square`, tracked or from an adaptive optimizer; before
        the first step all score 0.
      exponent: power of E[g^2], in [0, 1].
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Raises:
      ValueError: there are no squared gradients, or they are another model's; the
        exponent is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[1.0, -2.0]])}
      >>> squares = {"w": jnp.array([[16.0, 1.0]])}
      >>> importance = jp.Importance(square=squares)
      >>> jp.scores.preconditioned_magnitude(w, importance)["w"].tolist()
      [[2.0, 2.0]]
    """
    if not is_between(exponent, 0, 1):
        raise ValueError(f"exponent must be in [0, 1], got {exponent}; 0.25 is usual")
    if exponent == 0.25:
        quarter = formulas.size_and_quarter_power
        return _score(quarter, params, prunable, importance, "square")
    power = formulas.size_and_power
    return _score(power, params, prunable, importance, "square", exponent)


def taylor(
    params: Params, importance: Any = None, *, prunable: PrunableLike = leaves.prunable
) -> Scores:
    """The first-order change of the loss, averaged over training: E|w g|.

    Args:
      params: the parameters; names and shapes are read, values are not.
      importance: averages with `taylor`, from `track_gradients(average=("taylor",))`;
        before the first step all score 0.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32.

    Raises:
      ValueError: it was not tracked, or is another model's.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[1.0, 2.0]])}
      >>> jp.scores.taylor(w, jp.Importance(taylor=w))["w"].tolist()
      [[1.0, 2.0]]

    Reference:
      Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019,
      arXiv 1906.10771; without the outer square.
    """
    return _score(formulas.statistic_alone, params, prunable, importance, "taylor")


def random(
    params: Params,
    importance: Any = None,
    *,
    seed: int = 0,
    prunable: PrunableLike = leaves.prunable,
) -> Scores:
    """Uniform random scores, the control that every criterion must beat.

    Args:
      params: the parameters; names and shapes are read, values are not.
      importance: averages, which are not read; may be None.
      seed: rng seed of the scores; each leaf has its own stream, by position.
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params` in [0, 1), float32.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> jp.scores.random({"w": jnp.ones((2, 3))}, seed=1)["w"].shape
      (2, 3)
    """
    if not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"seed must be an integer, got {seed}")
    # A key for each leaf, pruned or not: excluding one leaf changes no other's scores.
    keys = list(jax.random.split(jax.random.key(seed), len(tree.names(params))))
    return _score(formulas.uniform, params, prunable, keys)


def threshold(
    params: Params,
    importance: Any = None,
    *,
    compare: Literal["weight", "average"] = "weight",
    prunable: PrunableLike = leaves.prunable,
) -> Scores:
    """The authors' threshold rule, as a score in standard deviations of the averages.

    Their rule removes, in each leaf, what is at or under rate * std(A). With the score
    |w| / std(A) that is `masks.above(scores, rate)`; a sparsity with the allocation
    "global" picks the rate that gives it.

    Args:
      params: the parameters.
      importance: averages with `weight`, from `track_importance`.
      compare: quantity that is compared: "weight" is the final |w| (the released
        code), "average" is |A| itself (the text of the papers).
      prunable: which leaves may be pruned.

    Returns:
      Scores like `params`, float32, in standard deviations (over the leaf, population).

    Raises:
      ValueError: the average was not tracked, is another model's, or `compare` is
        neither of the two.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = {"w": jnp.array([[2.0, -2.0]])}  # std 2
      >>> jp.scores.threshold(w, jp.Importance(weight=w))["w"].tolist()
      [[1.0, 1.0]]

    Reference:
      The code released with Islam, Belhaouari, Bermak, "Neural Network Optimization
      with Weight Evolution", 2023; rates there run from 0.1 to 6.
    """
    if compare not in ("weight", "average"):
        raise ValueError(f"compare must be 'weight' or 'average', got {compare!r}")
    formula = (
        formulas.average_in_deviations
        if compare == "average"
        else formulas.weight_in_deviations
    )
    return _score(formula, params, prunable, importance, "weight")


def prunable_names(prunable: PrunableLike, named: Mapping[str, Any]) -> set[str]:
    """The names of the leaves that a rule lets be pruned, which must be some.

    Args:
      prunable: rule of a criterion.
      named: leaves by name, with those that were left out.

    Returns:
      Names of leaves that were not left out.
    """
    excluded = [name for name, leaf in named.items() if tree.is_excluded(leaf)]
    # A node that was left out may stand for names that a glob would match.
    rule = (
        leaves.as_rule(prunable)
        if excluded
        else leaves.checked_rule(prunable, list(named))
    )
    names = {k for k, leaf in named.items() if k not in excluded and rule(k, leaf)}
    if not names:
        raise ValueError(
            f"some leaf must be prunable, but none of {listed(named)} is; give "
            "prunable=lambda name, leaf: ... that is True for the leaves to prune"
        )
    return names


def _score(
    formula: Callable[..., jax.Array],
    params: Params,
    prunable: PrunableLike,
    importance: Any = None,
    field: str = "",
    *constants: float,
) -> Scores:
    """`formula(leaf, statistic, *constants)` of every prunable leaf.

    The statistics are a field of the importance; without its name `importance` is a
    list of them, one for each leaf, or None.
    """
    if is_state(params):
        raise TypeError(
            "a criterion takes the parameters first and the importance second, but got "
            f"{type(params).__name__} as the parameters; call criterion(params, "
            "importance)"
        )
    statistics = tracked(importance, field, params) if field else importance
    named = tree.named_leaves(params)
    scored = prunable_names(prunable, named)
    rows = zip(named, statistics or (), strict=False)
    if untracked := [n for n, x in rows if n in scored and tree.is_excluded(x)]:
        raise ValueError(
            f"every prunable leaf must have been tracked, but {listed(untracked)} were "
            "not; track them, E[g^2] by optax.chain(jp.track_gradients(), optimizer), "
            "or leave them out with prunable=jp.tree.excluding(...)"
        )
    compiled = _compiled(formula)

    # A leaf at a time, each placed as its parameter is: nothing is gathered.
    def score(number: int, leaf: Any) -> jax.Array:
        statistic = () if statistics is None else (statistics[number],)
        scores = compiled(lazy.array(leaf), *statistic, *constants)
        return placement.placed(scores, leaf)

    scores = [
        score(number, leaf) if name in scored else MaskedNode()
        for number, (name, leaf) in enumerate(named.items())
    ]
    structure = jax.tree.structure(params, is_leaf=tree.is_leaf)
    return jax.tree.unflatten(structure, scores)


# One program for each formula and shape, whoever asks for scores.
@functools.cache
def _compiled(formula: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return jax.jit(formula)
