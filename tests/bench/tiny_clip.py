"""A small CLIP of the transformers library with random weights, saved as any checkpoint is: for benchmarks.

Assumes: the captions have enough words to train a tokenizer on; the same captions and size give the same directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

LAYERS, WIDTH, PATCH_PX, MAX_TOKENS, VOCABULARY = 4, 192, 8, 64, 8192
_PAD, _START, _END = "<pad>", "<s>", "</s>"


def save(folder: Path, captions: Sequence[str], size_px: int, dim: int) -> None:
    """config.json, model.safetensors, tokenizer.json and preprocessor_config.json in the folder."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    text = _tokenizer(captions)
    shape = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": WIDTH // 64, "projection_dim": dim}
    ids = {f"{name}_token_id": getattr(text, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = CLIPConfig(
        text_config={**shape, **ids, "vocab_size": len(text), "max_position_embeddings": MAX_TOKENS},
        vision_config={**shape, "image_size": size_px, "patch_size": PATCH_PX},
        projection_dim=dim,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    square = {"height": size_px, "width": size_px}
    pictures = CLIPImageProcessorPil(size=square, do_center_crop=False)
    CLIPProcessor(pictures, text).save_pretrained(folder)


def _tokenizer(captions: Sequence[str]) -> object:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = [_START, _END, _PAD]  # an end token of 2 would mean the largest id to transformers' CLIP
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    ends = [(token, bpe.token_to_id(token)) for token in (_START, _END)]
    bpe.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=_PAD, bos_token=_START, eos_token=_END, model_max_length=MAX_TOKENS
    )
