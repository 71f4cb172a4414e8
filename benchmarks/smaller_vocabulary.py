"""Fewer tokens cost little on text they were chosen for, and decode faster.

`python -m benchmarks.smaller_vocabulary MODEL OUT --sizes 65536 32768` runs `jaxprune
shrink --vocab` for each size, calibrated on plays and technical prose, and prints
weights, tokens a second of decoding with the head, and bits per byte of other plays and
other prose, of news, and of another language. What is in OUT is not run again. It needs
the packages of `benchmarks.texts`, and for the German
`pip install --no-deps django==5.2.8`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import measure, texts
from jaxprune.arrays.messages import columns
from jaxprune.lm import cli
from jaxprune.lm.checkpoints import rewrite

CALIBRATION = ("plays", "technical")
HELD_OUT = ("other-plays", "other-technical", "news", "german")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shrinks the vocabulary and prints the table.

    Attributes:
      model: a Hugging Face directory with a tokenizer.json.
      out: the folder to write: texts, smaller models with their records.
      sizes: how many tokens stay.
      sequences: sequences of 512 tokens along which the model expects tokens.
      limit: windows of each text that are evaluated.
      rounds: how often the models are timed, in turn; 0 does not time them.
    """

    model: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    sizes: tuple[int, ...] = (65536, 32768)
    sequences: int = 64
    limit: int = 8
    rounds: int = 5


def main(config: Config) -> None:
    """Runs what is missing, prints the table, then one JSON line."""
    measure.begin(config.out, config, "sequences", "limit")
    paths = texts.write_documents(config.out, (*CALIBRATION, *HELD_OUT))
    for size in config.sizes:
        out = config.out / str(size)
        if not (out / rewrite.NAME).is_file():
            # German is held out: nothing is calibrated on another language.
            words = ["shrink", config.model, out, "--vocab", size, "--limit"]
            words += [config.limit, "--speed-rounds", config.rounds]
            words += ["--sequences", config.sequences, "--length", 512]
            words += ["--calibration", *(paths[name] for name in CALIBRATION)]
            words += ["--evaluate", *(paths[name] for name in HELD_OUT)]
            if code := cli.main([*map(str, words)]):
                raise SystemExit(code)
    records = [rewrite.read_provenance(config.out / str(s)) for s in config.sizes]
    rows = [line for record in records for line in _rows(record)]
    header = ["tokens", "text", "bits/byte", "was", "change", "perplexity, times"]
    header += ["tokens of it", "was"]
    print(columns([header, *rows], right=True))
    # A model that is there may have been made without.
    timed = [record for record in records if "speed" in record]
    if timed:
        header = ["tokens", "weights, M", "decode, times", "by round", "dense itself"]
        print(columns([header, *map(_speed_row, timed)], right=True))
    measure.report("smaller_vocabulary", model=config.model.name, texts=rows)


def _rows(record: dict[str, Any]) -> list[list[str]]:
    """A row for each held-out text."""
    rows = []
    for name, text in record["perplexity"].items():
        before, after = text["dense"], text["shrunk"]
        bits, was = after["bits_per_byte"], before["bits_per_byte"]
        change = f"{bits / was - 1:+.2%}"
        size = f"{record['vocabulary']['after']:,}"
        # Of a token of the dense model, since the smaller one's are shorter.
        times = before["perplexity"] ** (bits / was - 1)
        rows.append([size, name, f"{bits:.4f}", f"{was:.4f}", change, f"{times:.3f}"])
        rows[-1] += [f"{after['tokens']:,}", f"{before['tokens']:,}"]
    return rows


def _speed_row(record: dict[str, Any]) -> list[str]:
    weights = (
        record["sizes"][when]["parameters"] / 1e6 for when in ("before", "after")
    )
    was, now = weights
    speed = record["speed"]["ratios"]["decode"]
    return [
        f"{record['vocabulary']['after']:,}",
        f"{now:.1f} of {was:.1f}",
        f"{speed['ratio']:.2f}",
        f"{speed['low']:.2f} to {speed['high']:.2f}",
        f"{speed['noise']:.2f}",
    ]


if __name__ == "__main__":
    main(tyro.cli(Config))
