"""Mutated model folders, archives and option lists, and what the command makes of them.

Each input ends as one of `KINDS`. `case(seed)` makes one input and runs the command on
it in this process; the same seed gives the same input.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import struct

import numpy as np

from tests.support import tiny_cli, tiny_hf
from tests.support.hf_directories import contents, load

KINDS = ("refused", "right", "traceback", "hang", "silent", "left", "clumsy")
SECONDS = 60
ODD = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, 10**400, 0.5, -0.5,
    1e-30, 1e30, float("nan"), float("inf"), "", "x", "silu", "None", [], [0], [[]],
    {}, {"a": 1}, ["sliding_attention"] * 2, {"rope_type": "yarn"}, "\u0000", "é",
]  # fmt: skip
FAMILIES = ("llama", "gpt2", "phi3-long", "qwen2", "gemma3-linear", "llama-yarn")


class _Hangs(BaseException):
    pass


def _alarm(*_):
    raise _Hangs


def run(words):
    """Exit code, stdout and stderr of the command; "hang" or "traceback" as a code."""
    from jaxprune.lm import cli

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in words])
    except _Hangs:
        code = "hang"
    except BaseException as error:  # whatever it is, it got through
        code = "traceback"
        err.write(f"{type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return code, out.getvalue(), err.getvalue()


class Fuzzer:
    """Makes inputs below a directory."""

    def __init__(self, root):
        """Makes one sound folder of each family, and a text."""
        self.root = root
        self.families = [name for name in FAMILIES]
        for name in self.families:
            folder = root / "sound" / name
            folder.parent.mkdir(exist_ok=True)
            tiny_hf.random_folder(name, folder)
            tiny_cli.tokenizer(folder)
        (root / "text.txt").write_text(tiny_cli.text(120))
        (root / "words.jsonl").write_text(json.dumps({"text": tiny_cli.text(120)}))
        self.archive = root / "sound.compact"
        run(["compact", root / "sound" / "llama", self.archive])

    def case(self, seed):
        """(kind, words, what was said) of one input."""
        chance = random.Random(seed)
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        make = chance.choice([self._folder] * 6 + [self._archive] * 2 + [self._options])
        words, check = make(chance, work)
        code, out, err = run(words)
        return judged(code, out, err, work, check), words, err

    # ---- what is mutated

    def _folder(self, chance, work):
        """A folder with one or two changes, and a command that reads it."""
        name = chance.choice(self.families)
        folder = work / "model"
        shutil.copytree(self.root / "sound" / name, folder)
        for _ in range(chance.choice([1, 1, 1, 2])):
            chance.choice(FOLDER)(chance, folder)
        command = chance.choice(
            ["inspect", "magnitude", "magnitude", "compact", "eval"]
        )
        out = work / "out"
        if command == "inspect":
            return ["inspect", folder], None
        if command == "compact":
            return ["compact", folder, out], lambda: _expands(out, folder, work)
        if command == "eval":
            words = ["eval", folder, "--text", self.root / "text.txt", "--context", 8]
            return [*words, "--limit", 2, "--json"], lambda: _like_transformers(folder)
        words = ["prune", folder, out, "--method", "magnitude", "--sparsity", "0.5"]
        return words, lambda: _is_pruned(folder, out)

    def _archive(self, chance, work):
        """A compact file with a few other bytes, or cut."""
        content = bytearray(self.archive.read_bytes())
        kind = chance.choice(["byte", "head", "cut", "swap", "longer"])
        if kind == "cut":
            del content[chance.randrange(len(content)) :]
        elif kind == "longer":
            content += bytes(chance.randrange(1, 64))
        elif kind == "swap":
            a, b = (chance.randrange(len(content) - 64) for _ in range(2))
            content[a : a + 64], content[b : b + 64] = (
                content[b : b + 64],
                content[a : a + 64],
            )
        else:
            most = 4096 if kind == "head" else len(content)
            content[chance.randrange(most)] ^= 1 << chance.randrange(8)
        path = work / "file"
        path.write_bytes(content)
        sound = self.root / "sound" / "llama"
        same = lambda: contents(work / "out") == contents(sound)  # noqa: E731
        return ["expand", path, work / "out"], same

    def _options(self, chance, work):
        """A sound folder, and options of all kinds."""
        folder, out = self.root / "sound" / chance.choice(self.families), work / "out"
        pool = {
            "--method": ["magnitude", "wanda", "none", ""],
            "--sparsity": ["0.5", "0", "1", "-1", "nan", "x", "1e-9", "0.999"],
            "--pattern": ["unstructured", "2:4", "4:2", "0:4", "3x3", "0x1", "x"],
            "--seed": ["0", "-1", "99999999999999999999", "x"],
            "--length": ["8", "16", "0", "-5", "65", "100000000000"],
            "--sequences": ["4", "0", "-4", "1000000"],
            "--batch": ["4", "3", "0"],
            "--limit": ["2", "0"],
            "--exclude": ["*q_proj*", "*", "", "["],
            "--evaluate": [self.root / "text.txt", "none.txt", folder],
            "--allocation": ["layer", "owl", "erk", "x"],
            "--ignore-config": ["vocab_size", "x", "rope_parameters"],
        }  # fmt: skip
        words = ["prune", folder, out]
        for name in chance.sample(sorted(pool), chance.randrange(1, 5)):
            words += [name, chance.choice(pool[name])]
        if "--method" not in words:
            words += ["--method", "magnitude"]
        if "--sparsity" not in words and "--pattern" not in words:
            words += ["--sparsity", "0.5"]
        return words, None


def judged(code, out, err, work, check):
    """Which of `KINDS` it was."""
    if code in ("hang", "traceback"):
        return code
    if "Traceback" in err:
        return "traceback"
    if code == 0:
        return "right" if check is None or check() else "silent"
    left = [path.name for path in work.iterdir() if path.name not in ("model", "file")]
    if left:
        return "left"
    lines = [line for line in err.splitlines() if line.startswith("jaxprune ")]
    python = r"\bjp\.|(overwrite|sliding)=True|\bprunable\b|allow_pickle|Unstructured\("
    clear = code == 2 or (len(lines) == 1 and not re.search(python, lines[0]))
    return "refused" if clear else "clumsy"


# ---- changes of a folder


def _config(folder):
    try:
        return json.loads((folder / "config.json").read_text()) or {"a": 1}
    except (OSError, ValueError):  # another change came first
        return {"model_type": "llama"}


def _write(folder, config):
    if not (folder / "config.json").is_dir():
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "config.json").write_text(json.dumps(config))


def _attribute(chance, folder):
    config = _config(folder)
    where = config
    nested = [value for value in config.values() if isinstance(value, dict) and value]
    if nested and chance.random() < 0.4:
        where = chance.choice(nested)
    where[chance.choice(sorted(where))] = chance.choice(ODD)
    _write(folder, config)


def _removed(chance, folder):
    config = _config(folder)
    del config[chance.choice(sorted(config))]
    _write(folder, config)


def _added(chance, folder):
    names = [
        "my_note", "gating", "partial_rotary_factor", "rope_scaling", "head_dim",
        "layer_types", "sliding_window", "quantization_config", "eos_token_id",
        "bos_token_id", "is_llama_config", "attn_logit_softcapping", "n_inner",
    ]  # fmt: skip
    changed = {chance.choice(names): chance.choice(ODD)}
    _write(folder, _config(folder) | changed)


def _text(chance, folder):
    name = chance.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
    if not (folder / name).is_file():
        return
    content = bytearray((folder / name).read_bytes() or b" ")
    kind = chance.randrange(3)
    if kind == 0:
        del content[chance.randrange(len(content)) :]
    elif kind == 1:
        content[chance.randrange(len(content))] = chance.randrange(256)
    else:
        content = bytearray(chance.choice([b"", b"[]", b"null", b"{}", b"\xff\xfe{}"]))
    (folder / name).write_bytes(content)


def _header(chance, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes() if path.is_file() else b""
    if len(content) < 16:  # another change came first
        return
    size = struct.unpack("<Q", content[:8])[0]
    head = bytearray(content[: 8 + size])
    head[chance.randrange(len(head))] = chance.randrange(256)
    path.write_bytes(bytes(head) + content[8 + size :])


def _cut(chance, folder):
    path = folder / "model.safetensors"
    if path.is_file() and path.stat().st_size:
        os.truncate(path, chance.randrange(path.stat().st_size))


def _tensor(chance, folder):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    try:
        held = load_file(path)
    except (SafetensorError, OSError):  # another change came first
        return
    name = chance.choice(sorted(held))
    value = held[name].copy()
    kind = chance.randrange(5)
    if kind == 0:
        del held[name]
    elif kind == 1:
        held[name] = np.ascontiguousarray(value.reshape(-1)[: value.size // 2])
    elif kind == 2:
        held[name] = value.astype(chance.choice([np.float16, np.int32, np.float64]))
    elif kind == 3:
        value.reshape(-1)[chance.randrange(value.size)] = chance.choice(
            [np.nan, np.inf, -0.0]
        )
        held[name] = value
    else:
        held[f"{name}.{chance.choice(['extra', 'é', '../x'])}"] = value
    save_file(held, path)


def _file(chance, folder):
    name = chance.choice([path.name for path in sorted(folder.iterdir())])
    kind = chance.randrange(4)
    if (folder / name).is_dir():
        return
    (folder / name).unlink()
    if kind == 1:
        (folder / name).mkdir()
    elif kind == 2:
        (folder / name).symlink_to("/etc/hostname")
    elif kind == 3:
        (folder / name).write_bytes(b"")


FOLDER = (_attribute,) * 5 + (_removed, _added, _added, _text, _header, _cut, _tensor)
FOLDER += (_tensor, _file)


# ---- oracles


def _expands(file, folder, work):
    code, _, _ = run(["expand", file, work / "again"])
    if code:
        return False
    before, after = contents(folder), contents(work / "again")
    return before.keys() == after.keys() and all(
        # Of weights the tensors are as they were, and not what stands around them.
        load(folder / name) == load(work / "again" / name)
        if name.endswith(".safetensors")
        else after[name] == content
        for name, content in before.items()
    )


def _like_transformers(folder):
    """The logits are transformers', where that is there and reads the folder too."""
    try:
        import torch
        import transformers
    except ImportError:
        return True
    from jaxprune.lm.models import hf

    model = hf.load(folder, dtype="float32").model
    tokens = tiny_hf.tokens(time=min(30, model.config.context))
    tokens = tokens % model.config.vocab_size
    try:
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager",
            output_loading_info=True,
        )  # fmt: skip
        expected = tiny_hf.torch_logits(theirs.eval(), tokens)
    except Exception:  # it refuses what we read; there is nothing to compare
        return True
    if info["missing_keys"] or info["mismatched_keys"]:
        return True
    found = tiny_cli.called(model, tokens)
    return np.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)


def _is_pruned(folder, out):
    """Half of each pruned tensor is zero, all else is as it was, bit for bit."""
    record = json.loads((out / "jaxprune.json").read_text())
    before, after = (load(path / "model.safetensors") for path in (folder, out))
    if before.keys() != after.keys():
        return False
    for name, (dtype, shape, content) in before.items():
        if after[name][:2] != (dtype, shape):
            return False
        if name not in record["tensors"]:
            if after[name][2] != content:
                return False
            continue
        kinds = {"F16": "f2", "F32": "f4", "F64": "f8"}
        old, new = (np.frombuffer(x, kinds[dtype]) for x in (content, after[name][2]))
        kept = new != 0
        if not (old[kept] == new[kept]).all():
            return False
        lost = np.abs(old[~kept]).max(initial=0)
        if (~kept).sum() != old.size // 2 or lost > np.abs(old[kept]).min(
            initial=np.inf
        ):
            return False
    others = {
        k: v for k, v in contents(folder).items() if not k.endswith("safetensors")
    }
    return contents(out).items() >= others.items()
