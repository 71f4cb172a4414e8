"""The slips of every beginner: each works as meant, or gets one sentence that helps."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.posttraining.passes.chaining import as_chain
from tests.support.trajectories import same_bits, weights

# Made when the first test needs them: whoever collects the tests compiles nothing.


@functools.cache
def params():
    return weights()


@functools.cache
def scores():
    return jp.scores.magnitude(params())


@functools.cache
def masks():
    return jp.masks.make(scores(), 0.5)


@functools.cache
def state():
    return optax.adam(0.1).init(params())


def lean():
    return jp.get_importance(jp.track_importance(storage="int8").init(params()))


def importance():
    return jp.Importance(square=params())


SLIPS = {
    "criterion(importance, params)": (
        lambda: jp.scores.preconditioned_magnitude(importance(), params()),
        r"parameters first and the importance second, but got Importance",
    ),
    "criterion(state, params)": (
        lambda: jp.scores.obd(state(), params()),
        r"parameters first and the importance second, but got tuple as the parameters",
    ),
    "make(sparsity, scores)": (
        lambda: jp.masks.make(0.5, scores()),
        r"that a criterion made, got 0\.5; call jp\.masks\.make\(scores, sparsity\)",
    ),
    "make(importance)": (
        lambda: jp.masks.make(importance(), 0.5),
        r"a criterion made, got an Importance; .* jp\.scores\.preconditioned_magnitude",
    ),
    "make(masks)": (
        lambda: jp.masks.make(masks(), 0.5),
        r"scores must be floating arrays, but 'layer/kernel' are not; cast them",
    ),
    "apply(masks, params)": (
        lambda: jp.masks.apply(masks(), params()),
        r"masks must be boolean arrays, .*'layer/kernel'.* make them with jp\.masks",
    ),
    "apply(params, scores)": (
        lambda: jp.masks.apply(params(), scores()),
        r"masks must be boolean arrays, .*'layer/kernel' are not; make them with",
    ),
    "prune(scores, params)": (
        lambda: jp.prune(scores(), params(), 0.5),
        r"leave out 'layer/bias', 'token_embedding'; call jp\.prune\(params, scores,",
    ),
    "prune(params, sparsity)": (
        lambda: jp.prune(params(), 0.5),
        r"that a criterion made, got 0\.5; .* jp\.prune\(params, scores, sparsity\)",
    ),
    "prune(params, masks)": (
        lambda: jp.prune(params(), masks(), 0.5),
        r"scores must be floating arrays, but 'layer/kernel' are not; cast them",
    ),
    "2:4 of six inputs": (
        lambda: jp.masks.make({"h": {"k": jnp.ones((6, 4))}}, pattern="2:4"),
        r"NM\(2, 4\) needs .* by 4, got 6 at 'h/k'; leave such leaves out .*excluding",
    ),
    "keep_masks(masks, optimizer)": (
        lambda: jp.keep_masks(masks(), optax.sgd(0.1)),
        r"optimizer first and the masks second, but got dict as the optimizer; call",
    ),
    "make(an average in one byte)": (
        lambda: jp.masks.make({"w": lean().weight["layer"]["kernel"]}, 0.5),
        r"'w' are averages in one byte; make scores of them with jp\.scores\.averaged",
    ),
    "unpack(masks)": (
        lambda: jp.masks.unpack(masks()),
        r"needs what jp\.masks\.pack returned, but 'layer/kernel' are not packed",
    ),
    "make({})": (
        lambda: jp.masks.make({}, 0.5),
        r"scores must have at least one leaf to prune, but have none; make them",
    ),
    "track_importance(0.9)": (
        lambda: jp.track_importance(0.9),
        r"track_importance needs a weighting such as .*power\(0\.5\), got 0\.9",
    ),
    "every=1.5": (
        lambda: jp.track_gradients(every=1.5),
        r"track_gradients needs an integer every, got 1\.5",
    ),
    "every=True": (
        lambda: jp.track_importance(every=True),
        r"track_importance needs an integer every, got True",
    ),
    "start=0.5": (
        lambda: jp.track_importance(start=0.5),
        r"track_importance needs an integer start, got 0\.5",
    ),
    "seed=1.5": (
        lambda: jp.track_importance(seed=1.5),
        r"track_importance needs an integer seed, got 1\.5",
    ),
    "lora(rank=2.5)": (
        lambda: jp.contrib.lora(optax.sgd(0.1), rank=2.5),
        r"lora needs an integer rank, got 2\.5",
    ),
    "NM(1.5, 4)": (
        lambda: jp.patterns.NM(1.5, 4),
        r"NM\(n, m\) needs integers 0 < n < m, got NM\(1\.5, 4\)",
    ),
    "Block(2.0, 2)": (
        lambda: jp.patterns.Block(2.0, 2),
        r"Block needs integer sides of at least 1, got Block\(rows=2\.0",
    ),
    "no such pattern": (
        lambda: jp.prune(params(), scores(), 0.5, pattern="3/4"),
        r"pattern must be one of unstructured, .*, got '3/4'",
    ),
    "no such allocation": (
        lambda: jp.prune(params(), scores(), 0.5, allocation="ekr"),
        r"allocation must be one of layer, global, erk, owl, .*, got 'ekr'",
    ),
    "no such method": (
        lambda: as_chain("gpt"),
        r"method must be one of magnitude, .*, got 'gpt'",
    ),
    "method=None": (
        lambda: as_chain(None),
        r"method must be one of .* such as jp\.passes\.sparsegpt\(\), got None",
    ),
    "a method's class": (
        lambda: as_chain(jp.passes.wanda),
        r"method must be one of .* such as jp\.passes\.sparsegpt\(\), got <class",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_gets_one_sentence_with_the_way_out(slip):
    call, words = SLIPS[slip]
    with pytest.raises((TypeError, ValueError), match=words) as raised:
        call()
    assert not str(raised.value).endswith(".")


def test_a_state_may_stand_for_its_importance():
    expected = jp.scores.obd(params(), jp.get_importance(state()))
    assert same_bits(jp.scores.obd(params(), state()), expected)


@pytest.mark.parametrize("left_out", [None, True])
def test_none_or_true_may_stand_for_a_mask_that_is_left_out(left_out):
    kernel = masks()["layer"]["kernel"]
    fewer = {
        "layer": {"bias": left_out, "kernel": kernel},
        "token_embedding": left_out,
    }
    assert same_bits(jp.masks.apply(params(), fewer), jp.masks.apply(params(), masks()))
    both = jp.masks.combine(masks(), fewer)
    np.testing.assert_array_equal(both["layer"]["kernel"], kernel)
    states = [jp.keep_masks(optax.sgd(0.1), m).init(params()) for m in (fewer, masks())]
    assert same_bits(*states)


def test_one_program_serves_every_threshold():
    of = {"w": jnp.arange(4.0)}
    above = jax.jit(lambda rate: jp.masks.above(of, rate)["w"])
    for rate in (0.5, 1.0, 2.5):
        assert above(rate).tolist() == [score > rate for score in range(4)]
    assert above._cache_size() == 1


def test_a_mask_that_is_left_out_is_so_after_packing():
    own = {"a": jnp.ones((2, 4), bool), "b": True}
    again = jp.masks.unpack(jp.masks.pack(own))
    weights = {"a": jnp.ones((2, 4)), "b": jnp.ones((2, 2))}
    assert same_bits(jp.masks.apply(weights, again), weights)


def test_a_leaf_without_weights_is_packed_and_unpacked():
    own = {"w": jnp.zeros((0, 4), bool)}
    assert jp.masks.unpack(jp.masks.pack(own))["w"].shape == (0, 4)


def test_numbers_are_no_masks_in_either_place():
    numbers, booleans = {"a": jnp.arange(3)}, {"a": jnp.ones(3, bool)}
    for pair in ((numbers, booleans), (booleans, numbers)):
        with pytest.raises(TypeError, match="bool"):
            jp.masks.combine(*pair)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"*": 0.5, "up/*": 0.75}, "'up/*' behind '*' would"),
        ({"up/*": 0.5, "up/kernel": 0.75}, "'up/kernel' behind 'up/*' would"),
        ({"u*": 0.5, "down/*": 0.5, "*/kernel": 0.7}, "'*/kernel' behind"),
    ],
)
def test_a_rule_that_earlier_ones_leave_nothing_is_told(rules, words):
    tree = {k: {"kernel": jnp.arange(16.0).reshape(4, 4)} for k in ("up", "down")}
    with pytest.raises(ValueError, match=re.escape(words)):
        jp.prune(tree, jp.scores.magnitude(tree), sparsity=rules)


def test_what_is_no_array_is_no_weight():
    tree = {"a": optax.MaskedNode(), "f": jax.nn.relu, "c": jnp.ones((2, 2))}
    assert str(jp.tree.explain(tree)).endswith("4 of 4 weights may be pruned")


def test_squares_of_what_is_no_gradient_any_more_are_told():
    def square(*chained):
        state = optax.chain(*chained).init(params())
        return jp.get_importance(state)

    with pytest.warns(UserWarning, match="track_gradients stands behind the optimizer"):
        square(optax.adamw(1e-3), jp.track_gradients())
    square(jp.track_gradients(), optax.adamw(1e-3))


@pytest.mark.filterwarnings("error")
def test_an_optimizer_of_other_leaves_is_on_neither_side_of_a_tracker():
    def of(name, *transformations):
        chosen = {"w": {key: key == name for key in tree["w"]}}
        return optax.masked(optax.chain(*transformations), chosen)

    tree = {"w": {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}}
    averages = jp.track_importance()
    parts = [
        *(of("a", optax.adamw(1e-3)), of("a", averages)),
        *(of("b", jp.track_gradients()), of("b", optax.adamw(1e-3))),
    ]
    importance = jp.get_importance(optax.chain(*parts).init(tree))
    assert isinstance(importance.weight["w"]["b"], optax.MaskedNode)
    swapped = optax.chain(*parts[:2], *parts[:1:-1]).init(tree)
    with pytest.warns(UserWarning, match="track_gradients stands behind the optimizer"):
        jp.get_importance(swapped)


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ({"x": jnp.ones((4, 8))}, "takes a list of batches, but got one batch"),
        (jnp.ones((4, 8)), r"write \[batch\], or list\(batches\)"),
    ],
)
def test_one_batch_is_no_list_of_batches(batches, words):
    def fn(params, x):
        return x @ params["w"]

    with pytest.raises(TypeError, match=words):
        jp.prune_trained(fn, {"w": jnp.ones((8, 3))}, batches, "wanda", sparsity=0.5)


def test_an_optimizer_without_second_moments_is_told_what_to_chain():
    state = optax.contrib.muon(1e-3).init({"w": jnp.ones((4, 4))})
    with pytest.raises(ValueError, match=r"optax.chain\(jp.track_gradients\(\)"):
        jp.scores.preconditioned_magnitude({"w": jnp.ones((4, 4))}, state)
