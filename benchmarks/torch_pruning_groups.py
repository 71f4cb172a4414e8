"""Torch-Pruning's dependency graph beside `jp.axis_groups` on tiny decoders.

`python -m benchmarks.torch_pruning_groups` builds a tiny random model of every family
whose checkpoints are read, and asks both what must go with one neuron of an MLP, one
key head and one position of the residual width. The answers are compared weight by
weight under the names of the checkpoint. It needs `pip install torch-pruning` beside
torch and transformers. Prints a Markdown table and one JSON line.

Reference: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023,
arXiv:2301.12900.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx

import jaxprune as jp
from benchmarks import measure
from jaxprune.arrays import tree
from jaxprune.models import hf
from jaxprune.structured import cut

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 97,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "llama": _SMALL,
    "llama, a key head a query head": {**_SMALL, "num_key_value_heads": 6},
    "mistral": _SMALL,
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 16},
    "phi3": _SMALL,
    "gemma3_text": {**_SMALL, "head_dim": 16, "query_pre_attn_scalar": 16},
}
ROLES = ("neuron", "head", "width")
Gone = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    """Compares the groups of each family.

    Attributes:
      families: which, names of `FAMILIES`.
      limit: seconds of CPU time that a question to theirs may take.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    limit: float = 120.0


def main(config: Config) -> None:
    """Compares and reports."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise ModuleNotFoundError(
            "the comparison needs the package 'torch-pruning', which is not installed; "
            "pip install torch-pruning, beside torch and transformers"
        )
    found = {
        family: compared(family, config.limit)
        for family in measure.progress(config.families, "comparing", "family")
    }
    print(table(found) + "\n")
    measure.report(
        "torch_pruning_groups",
        families=found,
        torch_pruning=importlib.metadata.version("torch-pruning"),
        transformers=importlib.metadata.version("transformers"),
    )


def compared(family: str, limit: float) -> dict[str, Any]:
    """Seconds of both, and for each role what theirs has too few or too many of."""
    config = {"model_type": family.split(",")[0], **FAMILIES[family]}
    mine, seconds = ours(config)
    yours, times = theirs(config, limit)
    answers = {
        role: found if isinstance(found, str) else difference(mine[role], found)
        for role, found in yours.items()
    }
    return {"ours": seconds, "theirs": times, "roles": answers}


def difference(mine: Gone, yours: Gone) -> dict[str, list[str]]:
    """The tensors of which theirs takes too little, and too much.

    Args:
      mine: name of a tensor to booleans: which of its weights go.
      yours: likewise.

    Returns:
      Names: "all" that lose any, "missing", "extra".
    """
    missing = [k for k, own in mine.items() if (own & ~yours.get(k, ~own)).any()]
    extra = [k for k, own in yours.items() if (own & ~mine.get(k, ~own)).any()]
    return {"all": list(mine), "missing": missing, "extra": extra}


def ours(config: dict[str, Any]) -> tuple[dict[str, Gone], float]:
    """What goes with the first unit of each role, and the seconds that it took.

    Args:
      config: as config.json says it.

    Returns:
      Role to name of a tensor of the checkpoint to booleans of its shape; seconds of
      CPU time.
    """
    shape = hf.decoder_config(config)
    graphdef, state = nnx.split(hf.abstract(shape), nnx.Param)
    started = time.process_time()
    groups = jp.axis_groups(
        lambda state, ids: nnx.merge(graphdef, state)(ids),
        state,
        jax.ShapeDtypeStruct((1, 8), np.int32),
    )
    seconds = time.process_time() - started
    chosen = {
        "neuron": _of(groups, "layers/0/mlp/down/kernel", 0, shape.mlp_width),
        "head": _of(groups, "layers/0/attention/out/kernel", 0, shape.kv_heads),
        "width": _of(groups, "layers/0/mlp/down/kernel", 1, shape.width),
    }

    def exported(kept: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        cuts = cut.of_groups(groups, kept)
        leaves = [_ones(cuts[name]) for name in tree.names(state)]
        params = jax.tree.unflatten(jax.tree.structure(state), leaves)
        named = hf.tensors(nnx.merge(graphdef, params), config)
        return {name: np.asarray(tensor) for name, tensor in dict(named).items()}

    whole, found = exported({}), {}
    for role, group in chosen.items():
        left = exported({group.name: np.arange(1, group.units)})
        gone = {name: whole[name] != left[name] for name in whole}
        found[role] = {name: own for name, own in gone.items() if own.any()}
    return found, seconds


def _of(groups: jp.AxisGroups, leaf: str, axis: int, units: int) -> Any:
    """The group on an axis of a leaf with so many units."""
    return next(
        group
        for group in groups
        if group.units == units and (leaf, 0, axis) in group.members
    )


def _ones(own: cut.LeafCut) -> np.ndarray:
    """Ones, and zeros where a leaf is cut."""
    found = np.zeros(own.before, np.float32)
    pairs = zip(own.kept[0], own.before, strict=True)
    kept = [np.arange(size) if at is None else at for at, size in pairs]
    found[np.ix_(*kept)] = 1
    return found


@contextlib.contextmanager
def within(limit: float) -> Iterator[None]:
    """Raises TimeoutError once the block has worked for so many seconds of CPU time."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not within {limit:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def theirs(
    config: dict[str, Any], limit: float
) -> tuple[dict[str, Gone | str], list[float]]:
    """What Torch-Pruning takes with the first unit of each role.

    Args:
      config: as config.json says it.
      limit: seconds of CPU time for a role.

    Returns:
      Role to what goes, or to the error; seconds of CPU time of each role's graph and
      group, where there is one.
    """
    times, roles = [], {}
    for role in ROLES:
        model = _torch_model(config)
        started = time.process_time()
        try:
            with within(limit):
                roles[role] = _pruned(_graph(model), model, *_root(model, role))
                times.append(time.process_time() - started)
        except Exception as error:  # whatever it raises is the result
            kind = "" if isinstance(error, TimeoutError) else type(error).__name__
            said = str(error).split("\n")[0]
            roles[role] = f"{kind}: {said}".removeprefix(": ")
    return roles, times


def _torch_model(config: dict[str, Any]) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    shape = transformers.AutoConfig.for_model(**config)
    return transformers.AutoModelForCausalLM.from_config(
        shape, attn_implementation="eager"
    ).eval()


def _graph(model: Any) -> Any:
    import torch
    import torch_pruning

    ids = torch.arange(8)[None]
    return torch_pruning.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": ids, "use_cache": False},
        output_transform=lambda out: out.logits,
        verbose=False,
    )


def _root(model: Any, role: str) -> tuple[Any, list[int]]:
    """The module whose outputs are the units, and the rows of the first unit."""
    shape = model.config
    if shape.model_type == "gpt2":
        layer, features = model.transformer.h[0], shape.n_embd // shape.n_head
        roots = {
            "neuron": (layer.mlp.c_fc, [0]),
            # Queries, keys and values lie behind each other.
            "head": (
                layer.attn.c_attn,
                [i + shape.n_embd for i in range(features)],
            ),
            "width": (layer.mlp.c_proj, [0]),
        }
        return roots[role]
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    rows = list(range(attention.head_dim))
    fused = getattr(attention, "qkv_proj", None)
    if fused is not None:
        queries = shape.num_attention_heads * attention.head_dim
        rows = [queries + row for row in rows]
    return {
        "neuron": (getattr(mlp, "gate_up_proj", None) or mlp.up_proj, [0]),
        "head": (fused or attention.k_proj, rows),
        "width": (mlp.down_proj, [0]),
    }[role]


def _pruned(graph: Any, model: Any, module: Any, rows: list[int]) -> Gone:
    """Which weights are gone once a group is removed: each holds its own number."""
    import torch

    pruner = graph.get_pruner_of_module(module)
    if pruner is None:
        raise ValueError(f"no pruner for a layer of type {type(module).__name__}")
    group = graph.get_pruning_group(module, pruner.prune_out_channels, rows)
    sizes = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        sizes[name] = tuple(weight.shape)
        weight.data = torch.arange(weight.numel(), dtype=torch.float32).view_as(weight)
    group.prune()
    found = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        gone = np.ones(sizes[name], bool)
        gone.reshape(-1)[weight.detach().flatten().long().numpy()] = False
        if gone.any():
            found[name] = gone
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row a family: seconds of both, and whether the groups agree."""
    rows = [["family", "ours, s", "Torch-Pruning, s", *ROLES]]
    rows.append(["---"] * len(rows[0]))
    for family, own in found.items():
        seconds = f"{max(own['theirs']):.2f}" if own["theirs"] else ""
        answers = [_said(own["roles"][role]) for role in ROLES]
        rows.append([family, f"{own['ours']:.2f}", seconds, *answers])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _said(answer: str | dict[str, list[str]]) -> str:
    if isinstance(answer, str):
        return answer
    missing, extra = answer["missing"], answer["extra"]
    if not missing and not extra:
        return "same"
    parts = []
    if missing:
        parts.append(f"too little of {len(missing)} of {len(answer['all'])} tensors")
    if extra:
        parts.append(f"too much of {len(extra)}")
    return ", ".join(parts)


if __name__ == "__main__":
    main(tyro.cli(Config))
