"""Text to token ids: a tokenizer trained on the run's own captions, or a pretrained one, both as tokenizers JSON.

Assumes: the padding token, side and length travel inside the JSON, the length limit in the spec.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 8192
_PAD, _START, _END = "<pad>", "<s>", "</s>"
# Longer than any sane token: text beyond it could only matter to a tokenizer that drops nearly everything.
_MAX_CHARS_PER_TOKEN = 64


def train(captions: Iterable[str]) -> Tokenizer:
    """Lower-cased byte-level BPE: every text has tokens, whatever its script. The same captions give the same one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=2,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (_START, _END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{_START} $A {_END}", special_tokens=ids)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(_PAD), pad_token=_PAD)
    return tokenizer


def from_json(text: str, max_tokens: int) -> Tokenizer:
    """Raises ValueError when the text is not a tokenizer."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"not a tokenizer: {error}") from error
    return limited(tokenizer, max_tokens)


def limited(tokenizer: Tokenizer, max_tokens: int) -> Tokenizer:
    """Cut at max_tokens, special tokens included; pad as the JSON says, to the longest text of a batch by default."""
    if tokenizer.padding is None:
        tokenizer.enable_padding(pad_id=0, pad_token=tokenizer.id_to_token(0))
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts to (ids, mask), both (B, L) int64; mask is 1 on real tokens."""
    assert tokenizer.truncation is not None
    limit = tokenizer.truncation["max_length"] * _MAX_CHARS_PER_TOKEN
    encodings = tokenizer.encode_batch_fast([text[:limit] for text in texts])
    ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
    mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64)
    return ids, mask
