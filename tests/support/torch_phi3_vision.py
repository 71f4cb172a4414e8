"""Phi-3-vision in torch, from installed parts: the reference of the parity tests.

Written from the description of Microsoft's model: transformers' CLIP tower and Phi-3
decoder, and between them the merging of patches, the separators and the projection.
The preparation of pictures is that of the published processor in Pillow and torch.
"""

import json
import re

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

CONFIG = {
    "model_type": "phi3_v",
    "architectures": ["Phi3VForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
    },
    "sliding_window": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attention_dropout": 0.0,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "image_dim_out": 32,
        "model_name": "a small tower",
        "name": "clip_vision_model",
        "num_img_tokens": 4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,  # the last one is not used
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    },
}


class Reference(nn.Module):
    """The model, with random values, the separators too."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        tower = dict(CONFIG["img_processor"]["vision_config"])
        names = ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")
        names += ("num_hidden_layers", "num_attention_heads", "max_position_embeddings")
        names += ("original_max_position_embeddings", "sliding_window")
        scaling = {**CONFIG["rope_scaling"], "rope_type": "longrope"}
        scaling["rope_theta"] = CONFIG["rope_theta"]
        del scaling["type"]
        self.clip = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                **tower, hidden_act="quick_gelu", attn_implementation="eager"
            )
        )
        self.decoder = transformers.Phi3ForCausalLM(
            transformers.Phi3Config(
                **{name: CONFIG[name] for name in names},
                rope_parameters=scaling,
                attn_implementation="eager",
                pad_token_id=0,
            )
        )
        inner, width = 4 * tower["hidden_size"], CONFIG["hidden_size"]
        self.glb_GN = nn.Parameter(torch.empty(1, 1, inner))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, inner))
        self.img_projection = nn.Sequential(
            nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.2)
        self.eval()

    def merged(self, features, rows, columns):
        """(rows * columns, patches, C) to a grid of 2 x 2 patches, its rows ended."""
        grid, width = int(features.shape[1] ** 0.5), features.shape[2]
        x = features.reshape(rows, columns, grid // 2, 2, grid // 2, 2, width)
        x = x.permute(0, 2, 1, 4, 3, 5, 6)
        x = x.reshape(rows * grid // 2, columns * grid // 2, 4 * width)
        ends = self.sub_GN[0].expand(len(x), 1, 4 * width)
        return torch.cat([x, ends], dim=1).reshape(-1, 4 * width)

    def image_embeddings(self, pixels, rows, columns):
        """What stands for one picture: (tokens, width); pixels (1 + crops, 3, h, w)."""
        states = self.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        parts = [
            self.merged(states[1:], rows, columns),
            self.glb_GN[0],
            self.merged(states[:1], 1, 1),
        ]
        return self.img_projection(torch.cat(parts))

    def forward(self, ids, pictures):
        """Logits (1, time, vocab); `pictures` are (pixels, rows, columns)."""
        x = self.decoder.model.embed_tokens(ids.clamp_min(0))
        for i, picture in enumerate(pictures, 1):
            x = x.clone()
            x[ids == -i] = self.image_embeddings(*picture)
        return self.decoder(inputs_embeds=x).logits

    def published(self):
        """Parameters by the names of the published checkpoints."""
        found = {}
        for name, parameter in self.named_parameters():
            if name.startswith("decoder."):
                name = name.removeprefix("decoder.")
            elif name.startswith("clip."):
                inner = name.removeprefix("clip.").removeprefix("vision_model.")
                name = f"model.vision_embed_tokens.img_processor.vision_model.{inner}"
            else:
                name = f"model.vision_embed_tokens.{name}"
            found[name] = parameter
        return found


def save(folder, model, **changes):
    """Writes the model as a folder of the published form."""
    tensors = {name: x.detach().contiguous() for name, x in model.published().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


def preprocess(image, size=336, crops=16):
    """The processor's picture: pixels (1 + crops, 3, size, size), rows, columns."""
    image = image.convert("RGB")
    turned = image.size[0] < image.size[1]
    if turned:
        image = image.transpose(Image.TRANSPOSE)
    width, height = image.size
    ratio = width / height
    scale = 1
    while scale * np.ceil(scale / ratio) <= crops:
        scale += 1
    scale -= 1
    new_width = int(scale * size)
    new_height = int(new_width / ratio)
    image = image.resize((new_width, new_height), Image.BILINEAR)
    target = int(np.ceil(new_height / size) * size)
    top = int((target - new_height) / 2)
    padded = np.full((target, new_width, 3), 255, np.uint8)
    padded[top : top + new_height] = np.asarray(image)
    if turned:
        padded = padded.transpose(1, 0, 2)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    whole = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))
    whole = (whole.float() / 255 - mean) / std
    view = functional.interpolate(whole[None], size=(size, size), mode="bicubic")
    rows, columns = whole.shape[1] // size, whole.shape[2] // size
    cut = whole.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4)
    return torch.cat([view, cut.reshape(-1, 3, size, size)]), rows, columns


def tokens(text, shapes, encode, tokens_of):
    """The processor's ids: chunks, and between them each placeholder's -i repeated.

    Its tokenizer puts BOS before each chunk, so `encode` does.
    """
    chunks = [list(encode(chunk)) for chunk in re.split(r"<\|image_\d+\|>", text)]
    numbers = [int(n) for n in re.findall(r"<\|image_(\d+)\|>", text)]
    ids = list(chunks[0])
    for number, chunk in zip(numbers, chunks[1:], strict=True):
        ids += [-number] * tokens_of(*shapes[number - 1]) + list(chunk)
    return ids
