"""`jaxprune shrink` of a model that goes through torch: fewer neurons and heads.

`jp.torch.shrink` removes them, and config.json says the new sizes. What was written is
loaded and run beside the smaller module before it takes its place.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxprune as jp
from jaxprune.arrays.messages import listed
from jaxprune.arrays.rules import reworded
from jaxprune.lm.checkpoints import new_weights
from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir, open_directory
from jaxprune.lm.steps import provenance
from jaxprune.lm.steps.console import Console
from jaxprune.lm.steps.settings import Removal, ShrinkJob
from jaxprune.lm.steps.shrink import check_shrink
from jaxprune.lm.steps.skeleton import Change, Prepared
from jaxprune.lm.torch_models import measures
from jaxprune.lm.torch_models.opening import (
    TorchModel,
    load_module,
    parameters_of_tensors,
    round_as_stored,
    stored_tensors,
)
from jaxprune.lm.torch_models.prune import traced_function
from jaxprune.lm.torch_models.routing import begin_through_torch
from jaxprune.lm.torch_models.samples import JobInputs, Samples, as_tensors
from jaxprune.lm.torch_models.shrink_sizes import SIZES, Size
from jaxprune.lm.torch_models.torch_step import TorchStep, open_torch_step
from jaxprune.torch.comparison import TOLERANCE, module_difference
from jaxprune.torch.conversion import as_numpy

_PYTHON = (
    "jp.torch.shrink(module, example, ...) in Python makes a smaller module, which is "
    "saved by its state_dict"
)


def prepare_torch_shrink(job: ShrinkJob, console: Console) -> Prepared:
    """A shrinking through torch, for `run_job`: all is read and checked."""
    begin_through_torch(job.model, console)
    check_shrink(job, through_torch=True)
    _check_sizes(job.removal, open_directory(job.model))
    fields = open_torch_step(job, console, copies=1)
    model = fields["model"]
    with fields["costs"].phase("trace"):
        batch = _first_batch(fields["inputs"], model, job.calibration.batch)
        shares, entries = _units_to_lose(job.removal, model, batch)
    shrinking = TorchShrinking(**fields, batch=batch, shares=shares, entries=entries)
    return Prepared(shrinking.plan, shrinking.run)


@dataclasses.dataclass(kw_only=True)
class TorchShrinking(TorchStep[ShrinkJob]):
    """A module that loses neurons and heads.

    Attributes:
      batch: {argument: array}, what the module is called with.
      shares: name of a group to the share of its units that it loses.
      entries: entry of config.json to the groups whose units it counts.
    """

    NAME, STAGES = "shrink", ("dense", "shrunk")

    batch: Mapping[str, np.ndarray]
    shares: Mapping[str, float]
    entries: Mapping[str, tuple[str, ...]]

    def facts(self) -> dict[str, Any]:
        """What decides the smaller module, known without shrinking."""
        return {**super().facts(), "asked": self.job.removal.asked}

    def change(self) -> Change[Any]:
        """The smaller module, rounded to what its directory can hold."""
        small, report = self.shrink()
        round_as_stored(self.source, small, parameters_of_tensors(small))
        return Change(small, set(), set(), _shrinking_record(self, report))

    def shrink(self) -> tuple[Any, dict[str, Any]]:
        """The smaller module and the report of `jp.torch.shrink`."""
        samples, removal = self.inputs.calibration, self.job.removal
        settings: dict[str, Any] = {}
        # A rule for neurons alone: heads are not counted in 64s.
        if removal.multiple > 1:
            source, multiple = self.model.source, removal.multiple
            settings["sizes"] = {
                name: range(multiple, source.config[entry] + 1, multiple)
                for entry, names in self.entries.items()
                for name in names
                if entry in _entries_of(source, "neurons")
            }
        choose: Any = jp.scores.magnitude
        # With samples the solver chooses, and updates what reads the units.
        if samples is not None:
            choose = jp.passes.sparsegpt()
            batches = samples.batches(self.job.calibration.batch)
            settings["batches"] = map(as_tensors, batches)
            settings["directory"] = self.job.work / "shrink"
        return jp.torch.shrink(
            self.model.module,
            as_tensors(self.batch),
            choose,
            {name: 1 - share for name, share in self.shares.items()},
            **settings,
        )

    def finish(self, change: Change[Any]) -> None:
        """Adds nothing: the record has the sizes."""

    def write(self, change: Change[Any]) -> None:
        """Writes the smaller directory, once what was written has been run."""
        _write(self, change.model, change.record)

    def plan(self) -> dict[str, Any]:
        """Says which groups would lose what share of their units."""
        shown = ", ".join(f"{share:g} of {name}" for name, share in self.shares.items())
        self.console.say(f"would be removed: {shown}")
        return {"plan": dict(self.shares), "asked": self.job.removal.asked}


def _units_to_lose(
    removal: Removal, model: TorchModel, batch: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
    """The shares and entries of a `TorchShrinking`, by the table of sizes."""
    fn, params = traced_function(model, batch)
    groups = jp.axis_groups(fn, params, jp.torch.as_arrays(as_tensors(batch)))
    shares: dict[str, float] = {}
    entries: dict[str, tuple[str, ...]] = {}
    # Several entries for an encoder and a decoder, each with groups of its own.
    for size in _asked_sizes(removal, model.source):
        count: int = model.source.config.get(size.entry) or 0
        share = _share(removal, size)
        names = [
            group.name
            for group in groups
            # A head inside of which units lie is no neuron, whatever its name.
            if group.default and group.units == count and _is_counted(group, size)
        ]
        if not names:
            raise ValueError(
                f"{size.entry} of model_type {model.source.config['model_type']} must "
                f"count {size.unit} that can go, but no group of the model has {count} "
                f"of them; {_PYTHON}"
            )
        if not 0 < (lost := round(share * count)) < count:
            raise ValueError(
                f"of {count} {size.unit} some must go and some stay, but a share of "
                f"{share:g} takes {lost}; give another share"
            )
        shares |= dict.fromkeys(names, share)
        entries[size.entry] = tuple(names)
    return shares, entries


def _is_counted(group: Any, size: Size) -> bool:
    return any(
        fnmatch.fnmatchcase(member.leaf, glob)
        for member in group.members
        for glob in size.globs
    )


def _first_batch(
    inputs: JobInputs, model: TorchModel, size: int
) -> dict[str, np.ndarray]:
    samples = inputs.calibration
    if samples is not None:
        return next(samples.batches(size))
    for item in inputs.measured.values():
        return next(item.samples.batches(1))
    # Nothing is calibrated or measured: any input shows the program.
    return dict(_any_sample(model).arrays)


def _any_sample(model: TorchModel) -> Samples:
    """An input of the right shape, where config.json says it."""
    config, name = model.module.config, model.module.main_input_name
    if name == "input_ids":
        tokens = np.arange(8, dtype=np.int64)[None] % config.vocab_size  # (1, 8)
        is_decoder = getattr(config, "is_encoder_decoder", False)
        more = {"decoder_input_ids": tokens} if is_decoder else {}
        return Samples({name: tokens, **more})
    size = getattr(config, "image_size", None)
    if size is None:
        raise ValueError(
            f"{model.class_name} takes {name}, whose shape config.json does not say; "
            "give --calibration, or --evaluate"
        )
    # Squares, or (height, width).
    height, width = size if isinstance(size, list | tuple) else (size, size)
    shape = (1, getattr(config, "num_channels", 3), height, width)
    return Samples({name: np.random.default_rng(0).normal(size=shape).astype("f4")})


def _asked_sizes(removal: Removal, source: CheckpointDir) -> list[Size]:
    sizes = SIZES.get(str(source.config.get("model_type")), ())
    return [size for size in sizes if _share(removal, size)]


def _entries_of(source: CheckpointDir, unit: str) -> list[str]:
    sizes = SIZES.get(str(source.config.get("model_type")), ())
    return [size.entry for size in sizes if size.unit == unit]


def _share(removal: Removal, size: Size) -> float:
    return removal.ffn if size.unit == "neurons" else removal.heads


def _check_sizes(removal: Removal, source: CheckpointDir) -> None:
    """Refuses units that config.json cannot count, before the weights are read."""
    units = {"neurons": removal.ffn, "heads": removal.heads}
    if uncounted := [
        u for u, share in units.items() if share and not _entries_of(source, u)
    ]:
        raise ValueError(
            f"config.json of model_type {source.config.get('model_type')} cannot say "
            f"that there are fewer {' and '.join(uncounted)}; leave them out; {_PYTHON}"
        )


def _shrinking_record(
    shrinking: TorchShrinking, report: Mapping[str, Any]
) -> dict[str, Any]:
    """What jaxprune.json says besides what was measured."""
    job, inputs = shrinking.job, shrinking.inputs
    solves = inputs.calibration is not None
    sizes = {
        when: {
            **{name: report[when][name] for name in ("parameters", "bytes")},
            **{e: report["groups"][n[0]][when] for e, n in shrinking.entries.items()},
        }
        for when in ("before", "after")
    }
    after, before = (sizes[when]["parameters"] for when in ("after", "before"))
    record: dict[str, Any] = {
        "through": f"torch, as {shrinking.model.class_name}",
        "pattern": "whole neurons and heads",
        "sparsity": job.removal.asked,
        "method": f"shrink by {'obs' if solves else 'magnitude'}",
        "achieved": 1 - after / before,
        "sizes": sizes,
        "layers": {},
        "removed": {"groups": report["groups"], "kept": report["kept"]},
        "error": report["error"],
    }
    if solves:
        record["calibration"] = shrinking.described_inputs
    return record


def _write(shrinking: TorchShrinking, small: Any, record: dict[str, Any]) -> None:
    """Writes the smaller directory, once what was written has been run."""
    model, job = shrinking.model, shrinking.job
    source, stored = model.source, stored_tensors(small)
    sizes = record["sizes"]["after"]
    # The groups of an entry have lost as many units each.
    config = {**source.config, **{entry: sizes[entry] for entry in shrinking.entries}}
    tensors = {}
    for name, info in source.tensors.items():
        # What the class does not read is as it was.
        read = functools.partial(source.read, name)
        shape = info.shape
        if name in stored:
            read = functools.partial(as_numpy, stored[name])
            shape = tuple(stored[name].shape)
        tensors[name] = new_weights.NewTensor(info.file, info.dtype, shape, read)

    def finish(
        place: Path, facts: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, bytes]]:
        check_loads(place, small, shrinking.batch, job.loading.dtype)
        return {}, provenance.page_file(facts)

    new_weights.write_new_weights(
        source,
        job.out,
        config,
        tensors,
        provenance=record,
        overwrite=job.overwrite,
        finish=finish,
    )


def check_loads(place: Path, small: Any, batch: Any, dtype: str | None = None) -> None:
    """Loads what was written, and runs it beside the module that it was written of.

    Args:
      place: the directory.
      small: the smaller module.
      batch: {argument: array}.
      dtype: dtype of the parameters; None as they are stored.

    Raises:
      ValueError: a weight is missing or misshapen, or outputs differ.
    """
    class_name = type(small).__name__
    try:
        module, info = load_module(place, type(small), dtype)
    except ValueError as failure:
        raise reworded(failure, ValueError, "the smaller directory: ") from failure
    module.config.use_cache = False
    # Unexpected ones are those that the class did not read before either.
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ValueError(
            "the smaller directory must have the shapes that config.json says, but as "
            f"{class_name} these do not fit: {listed(wrong)}; {_PYTHON}"
        )
    results = [measures.run_module(part, batch) for part in (module, small)]
    difference = module_difference(*results)
    # In half precision the two run in the same order, so they are equal too.
    if not difference <= TOLERANCE:
        raise ValueError(
            "the smaller directory must give what the smaller model gives, but loaded "
            f"as {class_name} it differs by {difference:.1e}; {_PYTHON}"
        )
