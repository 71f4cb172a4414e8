"""Folders of pictures with questions, as a user would have them."""

import json

import numpy as np
from PIL import Image


def write(folder, lines, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / f"{split}.jsonl").write_text(text + "\n")


def picture(folder, name="a.png", size=(6, 4)):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(array).save(folder / name)
    return array


LINE = {"image": "a.png", "question": "what ?", "answer": "noise"}
