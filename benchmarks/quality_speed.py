"""Which form of a model is best at each speed: a table, and its figure.

`python -m benchmarks.quality_speed MODEL WORK` makes each form of `FORMS` with the
command, calibrated on plays and technical prose; measures it as it is, and packed, on
other plays, other prose and news; and times all in turn, head included. What is in WORK
is not run again; --stages does a part. Bits per byte are the mean of
the three texts: other than perplexities they compare models whose tokens differ. It
needs the packages of `benchmarks.texts`, and the CPU kernels.
"""

import csv
import dataclasses
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from matplotlib.figure import Figure

from benchmarks import measure, texts
from jaxprune.files import atomic
from jaxprune.lm.report.canvas import COLOURS, FAINT, STYLE, svg

TRAINED = ("plays", "technical")
HELD_OUT = ("other-plays", "other-technical", "news")
STAGES = ("make", "measure", "time", "draw")

_PRUNE = ("prune", "--method", "alps", "--sparsity")
_ROUND = ("prune", "--method", "sparsegpt", "--sparsity", "0", "--quantize", "int4")


class Form(NamedTuple):
    """What a model can be made into.

    Attributes:
      words: words of the command that makes it; none for the model itself.
      removed: what goes: zeros, neurons or tokens; nothing of the model itself.
      share: how much of it, in [0, 1).
    """

    words: tuple[str, ...] = ()
    removed: str = ""
    share: float = 0.0


FORMS: dict[str, Form] = {
    "dense": Form(),
    **{
        f"{share:.0%} zeros".replace("%", " %"): Form(
            (*_PRUNE, f"{share:g}"), "zeros", share
        )
        for share in (0.5, 0.6, 0.7, 0.8)
    },
    "int4": Form(_ROUND),
    "75 % of the neurons": Form(("shrink", "--ffn", "0.25"), "neurons", 0.25),
    "half of the neurons": Form(("shrink", "--ffn", "0.5"), "neurons", 0.5),
    "half of the tokens": Form(("trim", "--tokens", "24576"), "tokens", 0.5),
}
COLUMNS = (
    *("form", "removed", "share", "values", "bits_per_byte", *HELD_OUT),
    *("tokens_per_second", "ratio"),
)
# How each is drawn, and its name in the legend.
_MARKS = {"": "o", "zeros": "o-", "neurons": "s--", "tokens": "^:"}
_REMOVED = {
    "zeros": "weights set to zero (ALPS)",
    "neurons": "neurons removed",
    "tokens": "tokens removed",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes, measures and times the forms of a model.

    Attributes:
      model: a Hugging Face directory of a family of ours.
      work: the folder of models, texts and records.
      forms: names of `FORMS`.
      stages: what is done; what is in WORK already is left as it is.
      sequences: sequences of 512 tokens that are calibrated on.
      limit: windows of each text that are evaluated.
      steps: tokens that are decoded in a round.
      rounds: how often each is timed, in turn.
      table: the CSV; WORK/table.csv if left out.
      figure: the SVG; WORK/figure.svg if left out.
    """

    model: Annotated[Path, tyro.conf.Positional]
    work: Annotated[Path, tyro.conf.Positional]
    forms: tuple[str, ...] = tuple(FORMS)
    stages: tuple[Literal["make", "measure", "time", "draw"], ...] = STAGES
    sequences: int = 32
    limit: int = 8
    steps: int = 16
    rounds: int = 5
    table: Path | None = None
    figure: Path | None = None


def main(config: Config) -> None:
    """Runs what is missing, then writes the table and the figure."""
    # Rounds and steps decide speeds alone, which are timed anew on each machine.
    measure.begin(config.work, config, "sequences", "limit")
    paths = texts.write_documents(config.work / "texts", (*TRAINED, *HELD_OUT))
    models = {name: _made(config, name, paths) for name in config.forms}
    if "measure" in config.stages:
        for name, model in models.items():
            for values in values_of(name):
                _measure(config, name, model, values, paths)
    if "time" in config.stages:
        for values in ("bfloat16", "int8", "int4"):
            _time(config, models, values)
    if "draw" in config.stages:
        rows = _rows(config)
        _write_table(config.table or config.work / "table.csv", rows)
        picture = svg(draw(rows), ground="white").encode()
        atomic.replace(config.figure or config.work / "figure.svg", picture)


def values_of(form: str) -> tuple[str | None, ...]:
    """The encodings a form is packed in; None is the model as it is, by XLA."""
    if "int4" in form:
        return ("int4",)
    # By XLA zeros take the dense model's time, so there is no point to draw.
    unpacked = (None,) if FORMS[form].words[:1] != ("prune",) else ()
    return (*unpacked, "bfloat16", "int8")


def _made(config: Config, form: str, paths: Mapping[str, Path]) -> Path:
    """The directory of a form, which is made if it is missing."""
    if not FORMS[form].words:
        return config.model
    out = config.work / form.replace(" ", "_").replace(",", "").replace("%", "percent")
    if "make" in config.stages and not (out / "jaxprune.json").is_file():
        job, *words = FORMS[form].words
        _command(
            *(job, config.model, out, *words, "--sequences", config.sequences),
            *("--calibration", *(paths[name] for name in TRAINED)),
            *("--evaluate", *(paths[name] for name in HELD_OUT)),
        )
    return out


def _measure(
    config: Config, form: str, model: Path, values: str | None, paths: Any
) -> None:
    packing = ("--packed", "--values", values) if values else ()
    record = _record(config, "quality", form, values)
    if not record.is_file() and model.is_dir():
        held_out = [paths[name] for name in HELD_OUT]
        words = ("--text", *held_out, "--limit", config.limit, *packing)
        atomic.replace(record, _command("eval", model, *words).encode())


def _time(config: Config, models: Mapping[str, Path], values: str) -> None:
    """Times the forms that are packed so, and the dense model as it is, in turn."""
    record = _record(config, "speed", "all", values)
    others = [p for n, p in models.items() if n != "dense" and values in values_of(n)]
    timed = json.loads(record.read_text())["models"] if record.is_file() else {}
    # Of another choice of forms it has others.
    missing = not timed or any(f"{path}, packed" not in timed for path in others)
    if missing and all(path.is_dir() for path in others):
        words = ("--packed", "--values", values, "--prompt", 16)
        words += ("--steps", config.steps, "--rounds", config.rounds)
        atomic.replace(
            record, _command("speed", config.model, *others, *words).encode()
        )


def _record(config: Config, kind: str, form: str, values: str | None) -> Path:
    name = f"{kind}_{form}_{values or 'xla'}.json"
    return config.work / name.replace(" ", "_").replace(",", "").replace("%", "percent")


def _command(*words: object) -> str:
    """Runs the command; gives the JSON that it prints."""
    line = [sys.executable, "-m", "jaxprune", *map(str, words), "--json"]
    print(*line[2:], file=sys.stderr, flush=True)
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def _rows(config: Config) -> list[dict[str, Any]]:
    """A row for each form and encoding that has been measured and timed."""
    rows = []
    for form in config.forms:
        for values in values_of(form):
            quality = _record(config, "quality", form, values)
            # Models as they are were timed beside those in bfloat16.
            speed = _record(config, "speed", "all", values or "bfloat16")
            if quality.is_file() and speed.is_file():
                measured = json.loads(quality.read_text())["texts"]
                timed = json.loads(speed.read_text())["models"]
                model = str(_made(dataclasses.replace(config, stages=()), form, {}))
                times = timed[f"{model}, packed" if values else model]
                rows.append(_row(form, values, measured, times))
    return rows


def _row(
    form: str, values: str | None, measured: Mapping[str, Any], times: Any
) -> dict[str, Any]:
    bits = [text["bits_per_byte"] for text in measured.values()]
    ratio = times["ratios"]["decode"]["ratio"] if "ratios" in times else 1.0
    return {
        "form": form,
        "removed": FORMS[form].removed,
        "share": FORMS[form].share,
        "values": values or "float32, XLA",
        "bits_per_byte": round(statistics.fmean(bits), 4),
        **{
            Path(name).stem: round(text["perplexity"], 2)
            for name, text in measured.items()
        },
        "tokens_per_second": round(times["decode"], 1),
        "ratio": round(ratio, 2),
    }


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic.replace(path, text.getvalue().encode())
    for row in rows:
        print(json.dumps(row))


@STYLE
def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bits per byte against speed: a line for what goes, a colour for each encoding."""
    encodings = dict.fromkeys(row["values"] for row in rows)
    colours = dict(zip(encodings, COLOURS, strict=False))
    canvas = Figure(figsize=(8.4, 4.6))
    axes = canvas.add_axes((0.08, 0.12, 0.9, 0.85))
    for removed, values in dict.fromkeys((r["removed"], r["values"]) for r in rows):
        # Each line begins at the model of which nothing went.
        points = [
            row
            for row in rows
            if row["values"] == values and row["removed"] in ("", removed)
        ]
        points.sort(key=lambda row: row["share"])
        x, y = ([row[name] for row in points] for name in ("ratio", "bits_per_byte"))
        axes.plot(x, y, _MARKS[removed], color=colours[values])
        for row in points:
            # The encoding where a line begins, then the share that is gone.
            if row["removed"] == removed:
                name = f"{row['share']:.0%}" if removed else f"dense, {values}"
                axes.annotate(
                    name,
                    (row["ratio"], row["bits_per_byte"]),
                    (0, 6 if removed else -13),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colours[values],
                )
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("decoding, times as fast as the dense model in float32 by XLA")
    axes.set_ylabel("bits per byte, mean of three texts")
    axes.grid(color=FAINT)
    for removed, name in _REMOVED.items():
        axes.plot([], [], _MARKS[removed], color=FAINT, label=name)
    axes.legend(frameon=False, loc="upper right")
    return canvas


if __name__ == "__main__":
    main(tyro.cli(Config))
