"""One process of several: trains, scores, prunes; writes a digest of every result.

`python process_worker.py FILE` is one process with one device;
`python process_worker.py FILE RANK COUNT PORT` is one of COUNT processes with four
devices each, whose parameters are spread over all of them.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from experiments.harness.device_mesh import state_shardings

SHAPES = {"matrix": (24, 40), "stack": (2, 16, 24), "bias": (16,)}
# Kind of the mesh's axes, what is split how, what the averages are held in, what is
# masked in one program with all else, what chooses masks while it trains.
LAYOUTS = {
    "fully sharded": (
        AxisType.Auto,
        {"matrix": P(("x", "y")), "stack": P(None, "x"), "bias": P("x")},
        ("float32", "int8"),
        (
            (jp.patterns.Unstructured(), "layer"),
            (jp.patterns.NM(2, 4), "layer"),
            (jp.patterns.Channel(), "layer"),
        ),
        ("gradual",),
    ),
    "rows and columns": (
        AxisType.Explicit,
        {"matrix": P("x", "y"), "stack": P(None, "x", "y"), "bias": P()},
        ("float32", "bfloat16"),
        ((jp.patterns.Block(3, 4), "global"),),
        ("straight_through",),
    ),
}
ONE = {
    "one device": (
        None,
        {},
        ("float32", "int8", "bfloat16"),
        (*LAYOUTS["fully sharded"][3], *LAYOUTS["rows and columns"][3]),
        ("gradual", "straight_through"),
    )
}


def parameters(kind, specs):
    """Numbers with many ties, on one device or over all of all processes."""
    rng = np.random.default_rng(0)
    values = {
        k: np.round(rng.normal(size=s), 1).astype(np.float32) for k, s in SHAPES.items()
    }
    if jax.device_count() == 1:
        return jax.tree.map(jnp.asarray, values)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    return {
        name: jax.make_array_from_callback(
            x.shape, NamedSharding(mesh, specs[name]), x.__getitem__
        )
        for name, x in values.items()
    }


def gradients(params):
    """Elementwise, so that the number of devices can change no bit."""
    return jax.tree.map(lambda w: w * 0.5 + 0.25, params)


def trained(tx, params, state, steps):
    """Jitted steps."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def trackers(storage):
    return optax.chain(
        jp.track_gradients(storage=storage),
        optax.adamw(0.125),
        jp.track_importance(storage=storage),
    )


def watched(params, storages):
    """Three steps with each storage, the state placed by its shardings."""
    for storage in storages:
        tx = trackers(storage)
        where = state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=where)(params)
        after, state = trained(tx, params, state, 3)
        yield f"{storage}: parameters and state", (after, state)
        yield f"{storage}: importance", tuple(jp.get_importance(state))


def eagerly(params, importance):
    """What a user types at a prompt, each call a small program of its own."""
    yield "state", jp.track_importance().init(params)
    scores = jp.scores.preconditioned_magnitude(params, importance)
    yield "scores", scores
    masks = jp.masks.make(scores, 0.5, allocation="global")
    yield "masks", masks
    # Of the matrix, whose groups of four lie across devices.
    matrix = {"matrix": scores["matrix"]}
    yield "2:4", jp.masks.make(matrix, pattern=jp.patterns.NM(2, 4))
    packed = jp.masks.pack(masks)
    yield "packed", packed
    yield "unpacked", jp.masks.unpack(packed)
    sparse = jp.prune(params, scores, 0.5, allocation="global")
    yield "pruned", sparse
    yield "report", np.frombuffer(str(jp.sparsity(sparse)).encode(), np.uint8)
    tx = jp.keep_masks(optax.adamw(0.125), masks)
    yield "retrained", trained(tx, sparse, tx.init(sparse), 3)


def jitted(params, importance, masked):
    """Every criterion, and some patterns, in one program."""

    @jax.jit
    def everything(params, importance):
        criteria = [
            jp.scores.magnitude,
            jp.scores.preconditioned_magnitude,
            jp.scores.obd,
            jp.scores.random,
            jp.scores.threshold,
        ]
        scores = {c.__name__: c(params, importance) for c in criteria}
        made = {
            f"{pattern} {allocation}": jp.masks.make(
                scores["magnitude"], 0.5, pattern=pattern, allocation=allocation
            )
            for pattern, allocation in (
                (jp.patterns.Unstructured(), "global"),
                *masked,
            )
        }
        masks = made["Unstructured() global"]
        packed = jp.masks.pack(masks)
        return (
            scores
            | made
            | {
                "pruned": jp.prune(params, scores["obd"], 0.5, allocation="global"),
                "above": jp.masks.above(scores["threshold"], 0.5),
                "packed": packed,
                "unpacked": jp.masks.unpack(packed),
            }
        )

    return everything(params, importance)


def while_it_trains(params, names):
    """Masks that are chosen inside of eight updates, with events at 1, 3 and 5."""
    schedule = jp.schedules.cubic(0.75, begin=1, end=5, every=2)
    adamw = optax.adamw(0.125)
    choosers = {
        "gradual": jp.gradual(adamw, schedule),
        "straight_through": jp.straight_through(adamw, schedule, freeze=6),
    }
    for name in names:
        tx = choosers[name]
        after, state = trained(tx, params, tx.init(params), 8)
        yield name, (after, jp.masks.get(state))


def gathered(tree):
    """The tree with every array whole in this process, all by one program."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    ]
    whole = [NamedSharding(leaves[i].sharding.mesh, P()) for i in apart]
    program = jax.jit(lambda *arrays: arrays, out_shardings=tuple(whole))
    for i, leaf in zip(apart, program(*[leaves[i] for i in apart]), strict=True):
        leaves[i] = leaf.addressable_data(0)
    return jax.tree.unflatten(structure, leaves)


def digest(tree):
    """Of every bit of a tree."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def main(file, rank=None, count=None, port=None):
    """Computes everything and writes {layout: {result: digest}}."""
    if rank is not None:
        jax.distributed.initialize(
            f"127.0.0.1:{port}", num_processes=int(count), process_id=int(rank)
        )
    digests = {}
    layouts = ONE if rank is None else LAYOUTS
    for layout, (kind, specs, storages, masked, choosers) in layouts.items():
        params = parameters(kind, specs)
        results = dict(watched(params, storages))
        importance = jp.Importance(*results["float32: importance"])
        together = jitted(params, importance, masked)
        results |= {f"jitted: {k}": v for k, v in together.items()}
        results |= {f"eagerly: {k}": v for k, v in eagerly(params, importance)}
        results |= {f"training: {k}": v for k, v in while_it_trains(params, choosers)}
        whole = gathered(results)
        digests[layout] = {name: digest(tree) for name, tree in whole.items()}
    with open(file, "w") as out:
        json.dump({"devices": jax.device_count(), "digests": digests}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
