"""A pretrained text encoder that is small enough to be made in a test."""

from pathlib import Path

import pytest
import torch


def tiny_umt5(path: Path) -> Path:
    """Write a UMT5 of random weights with a tokenizer of six words, as Wan's text encoder lies on disk."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "cat"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.UMT5Config(
        vocab_size=6, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.5
    )
    transformers.UMT5EncoderModel(config).save_pretrained(path)
    return path
