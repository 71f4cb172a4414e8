"""`jaxprune shrink`: a smaller model, as a directory that every loader reads."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.arrays.messages import columns, listed
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.lm.models.loaded_model import LoadedModel
from jaxprune.lm.shrinking import possible_sizes, units
from jaxprune.lm.steps import provenance, rules
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.family_step import FamilyStep, open_step
from jaxprune.lm.steps.opening import as_stored, open_for_job, read_dense
from jaxprune.lm.steps.settings import Removal, ShrinkJob
from jaxprune.lm.steps.skeleton import Change, Prepared
from jaxprune.structured.sizes import lost_units


def prepare_shrink(job: ShrinkJob, console: Console) -> Prepared:
    """Reads what a shrinking needs, and refuses what does not fit.

    Args:
      job: options of the shrinking.
      console: where it speaks.

    Returns:
      The shrinking, ready to run.

    Raises:
      ValueError: something does not fit; nothing was written.
    """
    check_shrink(job)
    source = open_directory(job.model)
    # By sizes alone, before a text is tokenized.
    _check_fits(job.removal, source, open_for_job(job.model, job.loading))
    shrinking = FamilyShrinking(**open_step(job, console, copies=1))
    _note_narrowed(job.loading.dtype, source, console)
    return Prepared(shrinking.plan, shrinking.run)


def check_shrink(job: ShrinkJob, *, through_torch: bool = False) -> None:
    """Refuses what can be refused of a shrinking without opening the model."""
    asked = job.removal.asked
    others = [
        f"--{n.replace('_', '-')}" for n in asked if n not in ("budget", "multiple")
    ]
    rules.check_options(
        job,
        rules.SHRINK,
        through_torch=through_torch,
        asked=asked,
        others=", ".join(others),
    )


@dataclasses.dataclass(kw_only=True)
class FamilyShrinking(FamilyStep[ShrinkJob]):
    """A shrinking of a model of a family of ours; the dense one stays in memory."""

    NAME, STAGES = "shrink", ("dense", "shrunk")

    def facts(self) -> dict[str, Any]:
        """What decides the smaller model, known without reading a weight."""
        return {**super().facts(), "asked": self.job.removal.asked}

    def look_at_dense(self) -> None:
        """Reads the dense model once; see `FamilyStep`."""
        self.model = read_dense(self.model)
        super().look_at_dense()

    def change(self) -> Change[LoadedModel]:
        """Removes layers, experts, heads and neurons; the parameters that are left."""
        calibration, removal = self.job.calibration, self.job.removal
        tokens = self.texts.sequences if calibration.calibration else None
        small, record = self._without(tokens)
        if tokens is not None:
            record["calibration"] = self.texts.describe(calibration)
        ways = {
            "the loss without each layer": removal.layer_count is not None,
            "the layers named": len(removal.layers) > 1,
            "reap": bool(removal.experts),
            "magnitude" if tokens is None else "obs": "units" in record,
        }
        record |= {
            "pattern": "whole layers, experts, heads and neurons",
            "sparsity": removal.asked,
            "ignored_config": list(self.model.ignored),
            "method": f"shrink by {', '.join(way for way in ways if ways[way])}",
        }
        names = set(jp.tree.names(small.params))
        return Change(as_stored(small, names), names, set(), record)

    def finish(self, change: Change[LoadedModel]) -> None:
        """Adds the sizes of both models."""
        add_sizes(change.record, self.model, change.model)

    def write(self, change: Change[LoadedModel]) -> None:
        """Writes the smaller directory."""
        write_smaller(self, change, kept=change.record["layers"]["kept"])

    def _without(self, tokens: np.ndarray | None) -> tuple[LoadedModel, dict[str, Any]]:
        """The smaller model, and what became of it."""
        removal, batch = self.job.removal, self.job.calibration.batch
        work, dense = self.job.work, self.model
        record: dict[str, Any] = {}
        if removal.layer_count is None or tokens is None:
            record["layers"] = {
                "kept": [*(removal.layers or range(dense.config.layers))]
            }
        else:
            search = units.search_layers(
                dense,
                tokens,
                removal.layer_count,
                batch=batch,
                work=work,
                note=self.console.note,
            )
            record["layers"] = search._asdict()
        small = units.keep_layers(dense, record["layers"]["kept"])
        if removal.experts and tokens is not None:
            small, record["experts"] = units.without_experts(
                small, tokens, removal.experts, batch=batch
            )
        narrowing = _narrowing(removal, self.source, small.config)
        if narrowing.narrows:
            small, record["units"] = units.narrow(
                small, narrowing, tokens, batch=batch, work=work
            )
        return small, record

    def plan(self) -> dict[str, Any]:
        """Says what would be left of each unit, and by which texts."""
        removal, config = self.job.removal, self.model.config
        shapes = {
            name: (count, remaining)
            for name, count, remaining in _shapes(removal, config)
            # What a budget is divided over is not known yet.
            if not removal.budget
        }
        if removal.budget:
            self.console.say(
                f"{removal.budget:.1%} of the parameters would be left; what goes is "
                "divided over neurons and heads alike when it runs"
            )
        else:
            rows = [[name, f"{a:,}", f"{b:,}"] for name, (a, b) in shapes.items()]
            self.console.say(columns([["", "now", "then"], *rows], right=True))
        for line in self.texts.plan_lines(self.job.calibration):
            self.console.say(line)
        self.console.say("nothing was written")
        plan = {name: [*counts] for name, counts in shapes.items()}
        return {"plan": plan, "asked": removal.asked}


def write_smaller(
    step: FamilyStep[Any],
    change: Change[LoadedModel],
    *,
    kept: list[int],
    settings: Any = None,
) -> None:
    """Writes the directory of a smaller model.

    Args:
      step: step that made it.
      change: smaller model and its record.
      kept: numbers of the layers that stayed.
      settings: new contents of JSON files beside config.json.
    """
    hf.write_smaller(
        step.source.path,
        step.job.out,
        change.model.params,
        step.model.names,  # of all layers
        kept=kept,
        settings=settings or {},
        ignore_config=step.job.loading.ignore_config,
        provenance=change.record,
        overwrite=step.job.overwrite,
        finish=lambda _, record: ({}, provenance.page_file(record)),
    )


def _narrowing(
    removal: Removal, source: CheckpointDir, config: DecoderConfig
) -> units.Narrowing:
    possible = possible_sizes.possible_head_units(source.config, config)
    return removal.narrowing._replace(head_units=possible)


def _shapes(removal: Removal, config: DecoderConfig) -> Iterator[tuple[str, int, int]]:
    """Name of each unit, and their number now and after the removal."""
    layers = removal.layer_count or len(removal.layers) or config.layers
    yield "layers", config.layers, layers
    width = config.mlp_width
    yield "neurons a layer", width, neurons_left(removal, width)
    shares = {"heads a layer": (possible_sizes.count_head_units(config), removal.heads)}
    if config.experts:
        shares["experts a layer"] = (config.experts, removal.experts)
    for name, (count, share) in shares.items():
        yield name, count, count - round(share * count)


def neurons_left(removal: Removal, width: int) -> int:
    """Number of neurons that a layer keeps of `width`: the nearest that is possible."""
    nearest = width - round(removal.ffn * width)  # before it is made a multiple
    if nearest == width:
        return width
    # Of two as near, the larger.
    possible = possible_sizes.multiples(removal.multiple, width)
    return min(possible, key=lambda n: (abs(n - nearest), -n), default=width)


def _check_fits(removal: Removal, source: CheckpointDir, model: LoadedModel) -> None:
    """Refuses what the model's layers, heads, neurons and experts do not allow."""
    config, last = model.config, model.config.layers - 1
    if (removal.layer_count or 0) >= config.layers:
        raise ValueError(
            f"--layers must be less than the {config.layers} that there are, got "
            f"{removal.layer_count}"
        )
    named = removal.layers if len(removal.layers) > 1 else (0,)
    if list(named) != sorted({*named} & {*range(config.layers)}):
        raise ValueError(
            f"--layers must be ascending numbers from 0 to {last}, got "
            f"{', '.join(map(str, named))}"
        )
    _check_family(removal, source)
    heads = possible_sizes.count_head_units(config)
    name = "query heads" if config.kv_heads == 1 else "key heads"
    _check_units("ffn", removal.ffn, config.mlp_width, "neurons")
    _check_units("heads", removal.heads, heads, name)
    _check_units("experts", removal.experts, config.experts, "experts")
    most = config.experts - config.experts_per_token
    if round(removal.experts * config.experts) > max(most, 0):
        raise ValueError(
            f"each token is given to {config.experts_per_token} of the "
            f"{config.experts} experts, so at most {most} can go; give --experts at "
            f"most {most / config.experts:.4g}"
        )
    _check_heads(removal, source, config)
    if removal.multiple > 1 and "neurons" in hf.shrinkable(source.config):
        width, multiple = config.mlp_width, removal.multiple
        if removal.ffn and neurons_left(removal, width) >= width:
            raise ValueError(
                f"--ffn {removal.ffn:g} with --multiple {multiple} leaves all {width} "
                "neurons; give a larger share or a smaller multiple"
            )
        if removal.budget and multiple >= width:
            raise ValueError(
                f"--multiple must be less than the {width} neurons for some to go, got "
                f"{multiple}"
            )
    if removal.budget is not None:  # refuses one that is out of reach
        narrowing = _narrowing(removal, source, config)
        groups = units.group_axes(model)[2]
        roles = units.group_roles(groups, config)
        request = units.narrowing_request(narrowing, roles, config)
        lost_units(groups, request["keep"], request["groups"], request["sizes"])


def _check_family(removal: Removal, source: CheckpointDir) -> None:
    """Refuses units that the family's config.json cannot count."""
    able, family = hf.shrinkable(source.config), source.config["model_type"]
    if removal.experts and "experts" not in able:
        raise ValueError(
            "--experts is for mixtures of experts, which model_type "
            f"{family} is not; leave it out"
        )
    asked = {
        "neurons": removal.ffn or removal.budget,
        "heads": removal.heads or removal.budget,
    }
    flags = {"neurons": "--ffn", "heads": "--heads", "experts": "--experts"}
    others = [flag for unit, flag in flags.items() if unit in able]
    for unit, share in asked.items():
        if share and unit not in able:
            raise ValueError(
                f"a directory of model_type {family} cannot have fewer {unit}; give "
                f"{' or '.join([*others, '--layers'])}"
            )


def _check_units(option: str, share: float, count: int, name: str) -> None:
    """Refuses a share that is less than one unit, or all of them."""
    lost = round(share * count)
    if share and not lost:
        raise ValueError(
            f"--{option} {share:g} of {count} {name} is less than one of them; give at "
            f"least {1 / max(count, 1):.4g}"
        )
    if share and lost >= count:
        raise ValueError(
            f"a group must keep a unit, but --{option} {share:g} would remove all "
            f"{count} {name}; give at most {(count - 1) / count:.4g}"
        )


def _check_heads(
    removal: Removal, source: CheckpointDir, config: DecoderConfig
) -> None:
    """Refuses a number of query heads that transformers does not take."""
    heads = possible_sizes.count_head_units(config)
    per_unit = config.heads // heads  # query heads
    kept = heads - round(removal.heads * heads)
    fit = hf.heads_that_fit(source.config, config)
    if kept * per_unit in (*fit, config.heads):
        return
    shares = [
        f"--heads {1 - n / heads:.4g}"
        for n in range(heads - 1, 0, -1)
        if n * per_unit in fit
    ]
    raise ValueError(
        f"transformers takes a {source.config['model_type']} model only where "
        f"{hf.when_heads_fit(source.config, config)}, but {kept * per_unit} of "
        f"{config.heads} query heads would be left; give "
        f"{' or '.join(shares) or 'no share of the heads'}"
    )


def _note_narrowed(dtype: str | None, source: CheckpointDir, console: Console) -> None:
    """Says which tensors lose bits: all leaves are written as they are read."""
    digits = jnp.finfo(dtype or np.float32).nmant  # bits of the fraction
    narrowed = [
        name
        for name, info in source.tensors.items()
        if jnp.issubdtype(info.dtype, jnp.floating)
        and jnp.finfo(info.dtype).nmant > digits
    ]
    if narrowed:
        console.note(
            f"all weights are written as they are read, in {dtype or 'float32'}: "
            f"{listed(narrowed)} lose bits"
        )


def add_sizes(record: dict[str, Any], before: LoadedModel, after: LoadedModel) -> None:
    """Adds to a record the sizes of both models, and the share that went."""
    sizes = {"before": _sizes(before), "after": _sizes(after)}
    share = sizes["after"]["parameters"] / sizes["before"]["parameters"]
    record.update(sizes=sizes, achieved=1 - share)


def _sizes(model: LoadedModel) -> dict[str, float]:
    named = jp.tree.named_leaves(model.params)
    stored = {name: model.names[name].dtype.itemsize for name in named}
    config = model.config
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        "bytes": sum(leaf.size * stored[name] for name, leaf in named.items()),
        "tokens": config.vocab_size,
        "width": config.width,
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "mlp_width": config.mlp_width,
        "experts": config.experts,
    }
