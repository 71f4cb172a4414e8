"""What a checkpoint directory must be, as rules; each says the way out."""

import re

from jaxprune.arrays.rules import Rule
from jaxprune.files.safetensors_file import Damaged, Unknown, is_text

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DAMAGED = "'{path}' is damaged: "
_COPY = "bring the file back from a copy"

# "google/gemma-3-270m" is what people have: a model's name on the Hugging Face hub.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")

PLACE = (
    Rule(
        lambda v: v.place.exists() or not _HUB_NAME.fullmatch(str(v.path)),
        "there is no directory '{path}', and nothing is downloaded",
        "`hf download {path} --local-dir {name}` fetches a model of the Hugging Face "
        "hub, and then give '{name}'",
        details=lambda v: {"name": v.place.name},
        error=FileNotFoundError,
    ),
    Rule(
        lambda v: v.place.exists(),
        "there is no directory '{path}'",
        f"give a local directory with {CONFIG} and *.safetensors, nothing is "
        "downloaded",
        error=FileNotFoundError,
    ),
    Rule(
        lambda v: v.place.is_dir(),
        f"a model is a directory with {CONFIG} and *.safetensors, but '{{path}}' is a "
        "file",
        "give the directory that it belongs to",
        error=Unknown,
    ),
)
HAS_CONFIG = Rule(
    lambda v: (v.directory / CONFIG).is_file(),
    f"a model's directory must hold {CONFIG}, but '{{directory}}' has none",
    "give the directory that holds it",
    error=Unknown,
)
PLAIN_WEIGHTS = Rule(
    lambda v: not v.quantized,
    "weights must be plain floating numbers, but {quantized[0]}",
    "save the model dequantised and give that directory",
    error=Unknown,
)
WEIGHT_MAP = Rule(
    lambda v: v.weight_map and is_text(v.weight_map),
    _DAMAGED + "its weight_map is no map of tensor names to file names",
    _COPY,
    error=Damaged,
)
INDEXED = (
    Rule(  # MLX writes an index of this file alone too
        lambda v: _SINGLE in v.files or not (v.directory / _SINGLE).is_file(),
        f"'{{directory}}' must hold one set of weights, but has both {_SINGLE} and "
        f"{INDEX}",
        "move one of the two elsewhere",
        error=Unknown,
    ),
    Rule(
        lambda v: not v.illegal,
        _DAMAGED + "{illegal} are no names of files of its own directory",
        _COPY,
        error=Damaged,
    ),
    Rule(
        lambda v: not v.foreign,
        "weights must be *.safetensors, but '{path}' lists {foreign}",
        "convert them with the safetensors package",
        error=Unknown,
    ),
)
ONE_FILE = (
    Rule(
        lambda v: len(v.files) <= 1,
        f"several safetensors files need a {INDEX} that says which belong to the "
        "model, but '{directory}' has {candidates} and none",
        "keep one of them, or add the index",
        error=Unknown,
    ),
    Rule(
        lambda v: v.files,
        "weights must be *.safetensors, but '{directory}' has {foreign}{reason}",
        "convert the model with the safetensors package and give that directory",
        error=Unknown,
    ),
)
INSIDE = Rule(
    lambda v: not v.out,
    "'{path}' is a link to '{target}', outside the model's directory",
    "copy the file into the directory",
    error=Unknown,
)
