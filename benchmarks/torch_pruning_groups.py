"""Torch-Pruning's dependency graph beside `jp.axis_groups` on tiny decoders.

`python -m benchmarks.torch_pruning_groups` builds a tiny random model of every family
whose checkpoints are read, and asks both what must go with one neuron of an MLP, one
key head and one position of the residual width. The answers are compared weight by
weight under the names of the checkpoint; where one may begin at several modules, the
answer that is most like ours counts. It needs `pip install torch-pruning` beside torch
and transformers. Prints a Markdown table and one JSON line.

Reference: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023,
arXiv:2301.12900.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
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
from jaxprune.lm.models import hf
from jaxprune.structured import cut

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,  # two query heads share a key head
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
    limit: float = 5.0


def main(config: Config) -> None:
    """Compares and reports."""
    if importlib.util.find_spec("torch_pruning") is None:
        raise ModuleNotFoundError(
            "the comparison needs the package 'torch-pruning', which is not installed; "
            "pip install torch-pruning, beside torch and transformers"
        )
    results = {
        family: compared(family, config.limit)
        for family in measure.progress(config.families, "comparing", "family")
    }
    print(agreement_table(results) + "\n")
    measure.report(
        "torch_pruning_groups",
        families=results,
        torch_pruning=importlib.metadata.version("torch-pruning"),
        transformers=importlib.metadata.version("transformers"),
    )


def compared(family: str, limit: float) -> dict[str, Any]:
    """Seconds of both, and for each role what theirs has too few or too many of."""
    config = {"model_type": family.split(",")[0], **FAMILIES[family]}
    groups, seconds = axis_groups(config)
    answers: dict[str, Any] = {"all groups": every_group(config, limit)}
    for role in ROLES:
        differences = [
            answer if isinstance(answer, str) else difference(groups[role], answer)
            for answer in torch_groups(config, role, limit)
        ]
        answers[role] = max(differences, key=_likeness)
    return {"ours": seconds, "theirs": answers}


def _likeness(answer: str | dict[str, list[str]]) -> float:
    """How near an answer is to ours; an error is farther than any."""
    if isinstance(answer, str):
        return -math.inf
    return -len(answer["missing"]) - len(answer["extra"])


def difference(ours: Gone, torch: Gone) -> dict[str, list[str]]:
    """The tensors of which Torch-Pruning takes too little, and too much.

    Args:
      ours: name of a tensor to booleans: which of its weights go.
      torch: the same of Torch-Pruning's answer.

    Returns:
      Names: "all" that lose any, "missing", "extra".
    """
    missing = [k for k, gone in ours.items() if (gone & ~torch.get(k, ~gone)).any()]
    extra = [k for k, gone in torch.items() if (gone & ~ours.get(k, ~gone)).any()]
    return {"all": list(ours), "missing": missing, "extra": extra}


def axis_groups(config: dict[str, Any]) -> tuple[dict[str, Gone], float]:
    """What goes with the first unit of each role, and the seconds that it took.

    Args:
      config: content of config.json.

    Returns:
      Role to name of a tensor of the checkpoint to booleans of its shape; seconds of
      CPU time.
    """
    # Shapes alone: axis groups are found in a trace.
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
        tensors = hf.tensors(nnx.merge(graphdef, params), config)
        return {name: np.asarray(tensor) for name, tensor in dict(tensors).items()}

    dense, removed = exported({}), {}
    for role, group in chosen.items():
        # All units but the first are kept: what differs goes with it.
        shrunk = exported({group.name: np.arange(1, group.units)})
        gone = {name: dense[name] != shrunk[name] for name in dense}
        removed[role] = {name: mask for name, mask in gone.items() if mask.any()}
    return removed, seconds


def _of(groups: jp.AxisGroups, leaf: str, axis: int, units: int) -> Any:
    """The group on an axis of a leaf with so many units."""
    return next(
        group
        for group in groups
        if group.units == units and (leaf, 0, axis) in group.members
    )


def _ones(leaf_cut: cut.LeafCut) -> np.ndarray:
    """Ones, and zeros where a leaf is cut."""
    ones = np.zeros(leaf_cut.before, np.float32)
    pairs = zip(leaf_cut.kept[0], leaf_cut.before, strict=True)
    kept = [np.arange(size) if units is None else units for units, size in pairs]
    ones[np.ix_(*kept)] = 1
    return ones


@contextlib.contextmanager
def within(limit: float) -> Iterator[None]:
    """Raises TimeoutError once the block has worked for so many seconds of CPU time."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not within {limit:g} s")

    # A signal, because a search in C or in a long loop looks at no clock.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def every_group(config: dict[str, Any], limit: float) -> str:
    """How many groups Torch-Pruning lists, and in what time; or the error."""
    model = _torch_model(config)
    started = time.process_time()
    try:
        with within(limit):
            count = len(list(_graph(model).get_all_groups()))
    except Exception as error:  # whatever it raises is the result
        return _told(error)
    return f"{count} in {time.process_time() - started:.2f} s"


def torch_groups(config: dict[str, Any], role: str, limit: float) -> list[Gone | str]:
    """What Torch-Pruning takes with the first unit of a role.

    Args:
      config: content of config.json.
      role: name in `ROLES`.
      limit: seconds of CPU time for an answer.

    Returns:
      What goes, or the error, for each module that one may begin at.
    """
    answers: list[Gone | str] = []
    for name, rows in roots(config, role):
        model = _torch_model(config)
        try:
            with within(limit):
                answers.append(_pruned(_graph(model), model, name, rows))
        except Exception as error:  # whatever it raises is the result
            answers.append(_told(error))
    return answers


def _told(error: Exception) -> str:
    error_type = "" if isinstance(error, TimeoutError) else type(error).__name__
    sentence = str(error).split("\n")[0]
    return f"{error_type}: {sentence}".removeprefix(": ")


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


def roots(config: dict[str, Any], role: str) -> list[tuple[str, list[int]]]:
    """The modules whose outputs are units of a role, and the rows of the first unit."""
    if config["model_type"] == "gpt2":
        layer, width = "transformer.h.0.", config["n_embd"]
        rows = range(width // config["n_head"])
        # c_attn has q, k and v behind each other, each as wide as the model.
        qkv_rows = [width * part + row for part in range(3) for row in rows]
        return {
            "neuron": [(f"{layer}mlp.c_fc", [0])],
            "head": [(f"{layer}attn.c_attn", qkv_rows)],
            "width": [(f"{layer}mlp.c_proj", [0])],
        }[role]
    layer, heads = "model.layers.0.", config["num_attention_heads"]
    fused, keys = config["model_type"] == "phi3", config["num_key_value_heads"]
    if role != "head":
        up = "gate_up_proj" if fused else "up_proj"
        return [(f"{layer}mlp.{up if role == 'neuron' else 'down_proj'}", [0])]
    features = config.get("head_dim", config["hidden_size"] // heads)
    shared = list(range(features * heads // keys))  # of the queries that share a key
    rows_by_part = {"q": shared, "k": shared[:features], "v": shared[:features]}
    if not fused:
        return [
            (f"{layer}self_attn.{x}_proj", rows) for x, rows in rows_by_part.items()
        ]
    begins = {"q": 0, "k": heads * features, "v": (heads + keys) * features}
    parts = [[begins[x] + row for row in rows] for x, rows in rows_by_part.items()]
    parts.append([row for part in parts for row in part])  # or all three at once
    return [(f"{layer}self_attn.qkv_proj", rows) for rows in parts]


def _pruned(graph: Any, model: Any, name: str, rows: list[int]) -> Gone:
    """Which weights are gone once a group is removed: each holds its own number."""
    import torch

    module = model.get_submodule(name)
    pruner = graph.get_pruner_of_module(module)
    group = graph.get_pruning_group(module, pruner.prune_out_channels, rows)
    sizes = {}
    for name, weight in model.named_parameters():
        sizes[name] = tuple(weight.shape)
        # Exact in float32 up to 2^24: the tensors are tiny.
        weight.data = torch.arange(weight.numel(), dtype=torch.float32).view_as(weight)
    group.prune()
    removed, parameters = {}, dict(model.named_parameters(remove_duplicate=False))
    for name, size in sizes.items():
        gone = np.ones(size, bool)
        # The numbers that are still there are the weights that stay.
        gone.reshape(-1)[parameters[name].detach().flatten().long().numpy()] = False
        if gone.any():
            removed[name] = gone
    return removed


def agreement_table(results: dict[str, dict[str, Any]]) -> str:
    """A row a family: seconds of ours, all groups of theirs, and whether they agree."""
    rows = [["family", "ours, s", "all groups", *ROLES]]
    for family, result in results.items():
        answers = [_said(result["theirs"][role]) for role in ("all groups", *ROLES)]
        rows.append([family, f"{result['ours']:.2f}", *answers])
    return measure.markdown(rows)


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
