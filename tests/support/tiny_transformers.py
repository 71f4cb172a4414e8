"""Tiny random models of transformers that are no family of ours, as directories."""

import json
import wave

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def text(words=4000, seed=0):
    """Words of two letters, which follow each other by a rule in most places."""
    rng = np.random.default_rng(seed)
    steps = rng.choice([1, 2], words, p=[0.8, 0.2])
    places = np.cumsum(steps) % len(LETTERS)
    return " ".join(LETTERS[i] + LETTERS[(i * 7) % 26] for i in places)


def tokenizer(folder, before="[CLS]", after="[SEP]"):
    """Trains a tokenizer on the text and writes it as BERT's is written."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=96, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([text()], trainer)
    ids = [(name, made.token_to_id(name)) for name in special]
    template = " ".join(filter(None, [before, "$A", after]))
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=ids
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    fast.save_pretrained(folder)
    return made.get_vocab_size()


def save(folder, class_name, config, seed=0):
    """Writes a random model of a class."""
    import torch
    import transformers

    torch.manual_seed(seed)
    module = getattr(transformers, class_name)(config).eval()
    # Larger than at the beginning of a training, so that outputs differ by sample.
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    module.save_pretrained(folder)
    return module


def bert(folder, class_name="BertForMaskedLM", **more):
    import transformers

    vocab_size = tokenizer(folder)
    config = transformers.BertConfig(
        vocab_size=vocab_size, max_position_embeddings=32, **SIZES, **more
    )
    return save(folder, class_name, config)


def vit(folder, class_name="ViTForImageClassification"):
    import transformers

    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return save(folder, class_name, config)


def clip(folder, class_name="CLIPModel"):
    import transformers

    text_sizes = {**SIZES, "vocab_size": tokenizer(folder), "eos_token_id": 3}
    config = transformers.CLIPConfig(
        text_config={**text_sizes, "max_position_embeddings": 32},
        vision_config={**SIZES, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    return save(folder, class_name, config)


def t5(folder, class_name="T5ForConditionalGeneration", **more):
    import transformers

    vocab_size = tokenizer(folder, before="", after="[SEP]")
    config = transformers.T5Config(
        vocab_size=vocab_size,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        **more,
    )
    return save(folder, class_name, config)


def deepseek(folder, class_name="DeepseekV3ForCausalLM"):
    """Experts that are stored one by one, and that the class joins in one array."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=tokenizer(folder, before="", after=""),
        num_key_value_heads=4,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        **SIZES,
    )
    return save(folder, class_name, config)


def wav2vec2(folder, class_name="Wav2Vec2ForCTC"):
    import transformers

    config = transformers.Wav2Vec2Config(
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        vocab_size=12,
        **SIZES,
    )
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return save(folder, class_name, config)


def whisper(folder, class_name="WhisperForConditionalGeneration"):
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=50,
        max_target_positions=40,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.WhisperFeatureExtractor(
        feature_size=8, chunk_length=1
    ).save_pretrained(folder)
    return save(folder, class_name, config)


def pictures(folder, count=12, seed=0):
    """Random pictures of blocks."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
        Image.fromarray(image).save(folder / f"{i:02}.png")


def sounds(folder, count=12, rate=16000, values=1600, seed=0):
    """Tones of a tenth of a second."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        tone = np.sin(2 * np.pi * rng.uniform(100, 2000) * np.arange(values) / rate)
        noisy = 0.5 * tone + 0.1 * rng.normal(size=values)
        with wave.open(str(folder / f"{i:02}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((noisy * 20000).astype("<i2").tobytes())
