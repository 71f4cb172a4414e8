"""The options of `jaxprune shrink`, and all that can be refused before it begins."""

import dataclasses
from typing import Any, ClassVar

from jaxprune.lm.checkpoints.checkpoint_dir import CheckpointDir
from jaxprune.lm.cli import job_options, parse
from jaxprune.lm.models import hf
from jaxprune.lm.models.decoder.config import DecoderConfig
from jaxprune.structured.budget import Measure

_LEAST = 4  # sequences of a search, a quarter of which judges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(job_options.JobOptions):
    """A model that becomes smaller.

    Attributes:
      ffn: the share of the neurons of each MLP to remove.
      multiple: the neurons that are left are the nearest multiple of this; 64 or
        128 suits the kernels of GPUs and TPUs.
      heads: the share of the heads to remove: of key heads, each with all query heads
        that share it; where all share one key head, of query heads. transformers takes
        Llama and Gemma only with query heads that divide the width.
      query_heads: the share of the query heads of each key head to remove.
      experts: the share of the experts of each layer to remove: those that the router,
        on --calibration, gives the least weight to and that answer the least (REAP).
      layers: how many layers to leave; those go whose absence changes least what the
        model predicts on --calibration.
      drop_layers: the numbers of the layers to remove, in place of --layers.
      budget: in place of --ffn and --heads, the share that may be left of the
        parameters, or of what --measure says; neurons and heads then lose one share.
      measure: what the budget is of. FLOPs and the milliseconds, which are measured
        here, are those of reading a prompt, without the head.
      search: divide what goes over neurons, heads and whole layers by the loss on the
        last quarter of the calibration's sequences; that takes several times as long.
      speed_rounds: how often both models are timed, in turn; 0 does not time them.
    """

    GROUPS: ClassVar = {
        "removal": (
            "ffn",
            "multiple",
            "heads",
            "query_heads",
            "experts",
            "layers",
            "drop_layers",
            "budget",
            "measure",
            "search",
        ),
        "evaluation": ("speed_rounds",),
    }
    EXAMPLE: ClassVar = (
        "jaxprune shrink MODEL OUT --ffn 0.5 --calibration prose.txt code.jsonl"
    )

    sequences: int = 32  # a search of layers reads them many times
    length: int = 256
    ffn: float = 0.0
    multiple: int = 1
    heads: float = 0.0
    query_heads: float = 0.0
    experts: float = 0.0
    layers: int | None = None
    drop_layers: tuple[int, ...] = ()
    budget: float | None = None
    measure: Measure = "parameters"
    search: bool = False
    speed_rounds: int = 5

    @property
    def asked(self) -> dict[str, Any]:
        """What is to go; JSON-able."""
        names = ("ffn", "heads", "query_heads", "experts", "layers", "drop_layers")
        every = (*names, "budget")
        found = {name: value for name in every if (value := getattr(self, name))}
        if found and self.multiple > 1:
            found["multiple"] = self.multiple
        if self.budget:
            found["measure"] = self.measure
        return {**found, "search": True} if self.search else found

    @property
    def narrows(self) -> bool:
        """Whether neurons or heads are to go."""
        return bool(self.budget or self.ffn or self.heads or self.query_heads)


def check(job: Job) -> None:
    """Refuses what can be refused without opening the model."""
    shares = {"ffn": job.ffn, "heads": job.heads, "query-heads": job.query_heads}
    for name, share in {**shares, "experts": job.experts}.items():
        if not 0 <= share < 1:
            raise ValueError(f"--{name} must be a share in [0, 1), got {share}")
    _check_budget(job, max(shares.values()))
    if job.search:
        _check_search(job)
    if job.layers is not None and job.drop_layers:
        raise ValueError("--layers and --drop-layers exclude each other; give one")
    if not job.asked:
        raise ValueError(
            "something must be removed; give --ffn, --heads, --query-heads, --experts, "
            "--layers, --drop-layers or --budget"
        )
    _check_calibration(job)
    if job.speed_rounds < 0:
        raise ValueError(f"--speed-rounds must not be negative, got {job.speed_rounds}")
    parse.check_at_least_one(layers=job.layers, multiple=job.multiple)
    if job.multiple > 1 and not (job.ffn or job.budget):
        raise ValueError(
            "--multiple is of the neurons that are left; give --ffn or --budget too, "
            "or leave it out"
        )
    job_options.check(job)


def _check_budget(job: Job, share: float) -> None:
    """Refuses a budget that another option contradicts; `share`: the largest given."""
    if job.budget is not None and not 0 < job.budget < 1:
        raise ValueError(f"--budget must be a share in (0, 1), got {job.budget}")
    if job.budget is not None and share > 0:
        raise ValueError(
            "--budget finds the shares of neurons and heads itself; leave out --ffn, "
            "--heads and --query-heads, or the budget"
        )
    if job.budget is None and job.measure != "parameters":
        raise ValueError(
            f"--measure {job.measure} says what a budget is of; give --budget too"
        )
    fewer = job.layers is not None or job.drop_layers or job.experts
    if job.measure == "milliseconds" and fewer:
        raise ValueError(
            "what layers and experts take of a budget is counted, so with them it is "
            "not of milliseconds; give --measure flops, bytes or parameters"
        )


def _check_calibration(job: Job) -> None:
    """Refuses what needs a calibration without one, and one that is not taken."""
    if job.own_sequences:
        raise ValueError(
            "--calibration self is for prune alone; give --calibration FILE..., or "
            "leave it out"
        )
    if job.layers is not None and not job.calibration:
        raise ValueError(
            "--layers needs --calibration FILE..., by which the layers are chosen; "
            "--drop-layers names them without"
        )
    if job.experts and not job.calibration:
        raise ValueError(
            "--experts needs --calibration FILE..., on which the router shows what it "
            "gives each expert"
        )


def _check_search(job: Job) -> None:
    if job.budget is None or not job.calibration:
        raise ValueError(
            "--search divides a budget by the loss on a text; give --budget and "
            "--calibration FILE..., or leave it out"
        )
    if job.measure == "milliseconds":
        raise ValueError(
            "--search counts, and cannot divide milliseconds; give --measure flops, "
            "bytes or parameters"
        )
    if job.layers is not None or job.drop_layers:
        raise ValueError(
            "--search finds the layers too; leave out --layers and --drop-layers"
        )
    if job.sequences < _LEAST:
        raise ValueError(
            f"--search needs at least {_LEAST} sequences, since a quarter of them "
            f"judges, got --sequences {job.sequences}"
        )


def check_fits(job: Job, source: CheckpointDir, config: DecoderConfig) -> None:
    """Refuses what this model cannot lose, before its parameters are read."""
    if job.layers is not None and job.layers > config.layers:
        raise ValueError(
            f"--layers must be at most the {config.layers} that there are, got "
            f"{job.layers}"
        )
    wrong = [i for i in job.drop_layers if not 0 <= i < config.layers]
    if wrong or len({*job.drop_layers}) == config.layers:
        raise ValueError(
            f"--drop-layers must be numbers from 0 to {config.layers - 1}, not all, "
            f"got {', '.join(map(str, job.drop_layers))}"
        )
    if job.query_heads and config.kv_heads in (1, config.heads):
        raise ValueError(
            "--query-heads needs several key heads with several query heads each, got "
            f"{config.heads} query and {config.kv_heads} key heads; give --heads"
        )
    _check_able(job, source)
    what = "query heads" if config.kv_heads == 1 else "key heads"
    _check_share("ffn", job.ffn, config.mlp_width, "neurons")
    _check_share("heads", job.heads, head_units(config), what)
    if job.experts:
        _check_experts(job, config)
    each = config.heads // config.kv_heads
    _check_share("query-heads", job.query_heads, each, "query heads of each key head")
    _check_heads(job, source, config)
    if job.multiple > 1 and "neurons" in hf.shrinkable(source.config):
        _check_multiple(job, config.mlp_width)


def head_units(config: DecoderConfig) -> int:
    """How many units `--heads` takes from: key heads, or the query heads of one."""
    return config.heads if config.kv_heads == 1 else config.kv_heads


def _check_heads(job: Job, source: CheckpointDir, config: DecoderConfig) -> None:
    """Refuses to leave so many query heads that transformers would not take them."""
    units = head_units(config)
    each = config.heads // units
    kept = units - round(job.heads * units)
    shared = each - round(job.query_heads * each)
    fit = hf.heads_that_fit(source.config, config)
    if kept * shared in (*fit, config.heads):
        return
    others = [
        f"--heads {1 - n / units:.4g}"
        for n in range(units - 1, 0, -1)
        if job.heads and n * shared in fit
    ] + [
        f"--query-heads {1 - n / each:.4g}"
        for n in range(each - 1, 0, -1)
        if job.query_heads and kept * n in fit
    ]
    raise ValueError(
        f"transformers takes a {source.config['model_type']} model only where "
        f"{hf.when_heads_fit(source.config, config)}, but {kept * shared} of "
        f"{config.heads} query heads would be left; "
        f"give {' or '.join(others) or 'no share of the heads'}"
    )


def _check_multiple(job: Job, width: int) -> None:
    """Refuses a multiple with which no neuron would go."""
    if job.ffn and neurons_left(job, width) == width:
        raise ValueError(
            f"--ffn {job.ffn:g} with --multiple {job.multiple} leaves all {width} "
            "neurons; give a larger share or a smaller multiple"
        )
    if job.budget and job.multiple >= width:
        raise ValueError(
            f"--multiple must be less than the {width} neurons for some to go, got "
            f"{job.multiple}"
        )


def neurons_left(job: Job, width: int) -> int:
    """How many neurons of a layer `--ffn` leaves."""
    left = width - round(job.ffn * width)
    if left == width:
        return width
    multiples = multiples_of(job, width)
    return min(multiples, key=lambda n: (abs(n - left), -n), default=width)


def multiples_of(job: Job, width: int) -> range:
    """The numbers of neurons that may be left of so many."""
    return range(job.multiple, width + 1, job.multiple)


def _check_experts(job: Job, config: DecoderConfig) -> None:
    """Refuses to leave fewer experts than a token is given to."""
    _check_share("experts", job.experts, config.experts, "experts")
    most = config.experts - config.experts_per_token
    if round(job.experts * config.experts) > most:
        raise ValueError(
            f"each token is given to {config.experts_per_token} of the "
            f"{config.experts} experts, so at most {most} can go; give --experts at "
            f"most {most / config.experts:.4g}"
        )


def _check_able(job: Job, source: CheckpointDir) -> None:
    """Refuses to take what the directories of a family cannot have fewer of."""
    able, kind = hf.shrinkable(source.config), source.config["model_type"]
    options = {"neurons": "--ffn, ", "heads": "--heads, "}
    rest = "".join(options[word] for word in able if word in options)
    asked = {"neurons": job.ffn, "heads": job.heads or job.query_heads}
    if job.experts and "experts" not in able:
        raise ValueError(
            f"--experts is for mixtures of experts, which model_type {kind} is not; "
            "leave it out"
        )
    for word, given in asked.items():
        if word not in able and (given or job.budget):
            raise ValueError(
                f"a directory of model_type {kind} cannot have fewer {word}; give "
                f"{rest}--layers or --drop-layers"
            )


def _check_share(option: str, share: float, units: int, what: str) -> None:
    """Refuses a share that leaves no unit, or takes none."""
    lost = round(share * units)
    if lost >= units:
        raise ValueError(
            f"a group must keep a unit, but --{option} {share:g} would remove all "
            f"{units} {what}; give at most {(units - 1) / units:.4g}"
        )
    if share and not lost:
        raise ValueError(
            f"--{option} {share:g} of {units} {what} is less than one of them; give "
            f"at least {1 / units:.4g}"
        )
