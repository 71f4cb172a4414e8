"""A tiny model whose layers differ in size, beside the dense one and zeros."""

import json

import jax
import numpy as np
from flax import nnx

import jaxprune as jp
from jaxprune.lm.models import hf
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import units
from tests.support import tiny_hf
from tests.support.removal import random_scores

IDS = tiny_hf.tokens(1, 8)
LAYERS = 3
# Layer 0 has fewer of both, layer 1 no attention, layer 2 no MLP and all heads.
ABSENT = {(1, "heads"), (2, "ffn")}


def unequal(folder):
    """Of a folder: the dense model, the smaller one, and the report of `jp.shrink`."""
    whole = hf.load(folder, dtype="float32")
    graphdef, params = nnx.split(whole.model, nnx.Param)
    dense = LoadedModel(graphdef, params, whole.config, whole.names, ())
    model = units.without_parts(dense, ABSENT)
    fn, example, groups = units.group_axes(model)
    roles = units.group_roles(groups, model.config)
    shares = {n: {"ffn": 0.5, "heads": 0.5}.get(r, 0) for n, r in roles.items()}
    shares = {n: s for n, s in shares.items() if n.startswith("layers/0/")}
    scores = random_scores(model.params, 0)
    result = jp.shrink(fn, model.params, example, scores, shares)
    return dense, units.with_smaller(model, result.params), result.report


def zeroed_logits(dense, report):
    """Logits of the dense model with zeros in the place of all that is gone."""
    leaves = dict(jp.tree.named_leaves(dense.params))
    rows = {"layers/1/attention/out/kernel": slice(None)}
    rows["layers/2/mlp/down/kernel"] = slice(None)
    for name, kept in report["kept"].items():
        part = "mlp/down" if "/mlp/" in name else "attention/out"
        leaf, before = f"layers/0/{part}/kernel", report["groups"][name]["before"]
        width = leaves[leaf].shape[0] // before  # rows of a unit
        gone = np.setdiff1d(np.arange(before), kept)
        rows[leaf] = (gone[:, None] * width + np.arange(width)).ravel()
    for leaf, gone in rows.items():
        leaves[leaf] = leaves[leaf].at[gone].set(0)
    params = jax.tree.unflatten(jax.tree.structure(dense.params), list(leaves.values()))
    return logits(dense.graphdef, params)


def logits(graphdef, params):
    return np.asarray(jax.jit(lambda p, t: nnx.merge(graphdef, p)(t))(params, IDS))


def written(dense, small, folder, out):
    """Writes a smaller model, and returns its config.json."""
    config = json.loads((folder / "config.json").read_text())
    config[hf.BLOCK_CONFIGS] = hf.block_configs(dense.config)
    settings = {"config.json": config}
    hf.write_smaller(folder, out, small.params, dense.names, settings=settings)
    return json.loads((out / "config.json").read_text())
