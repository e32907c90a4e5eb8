"""Text encoders: a small embedding table of words, trained with the model, or a frozen pretrained encoder."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..checks import shorten
from ..errors import UserError
from .config import TextConfig


class Words(NamedTuple):
    """Prompts as word ids.

    Attributes:
        rows: int64 (B, S), rows of the embedding table.
        mask: bool (B, S), False for padding.
    """

    rows: torch.Tensor
    mask: torch.Tensor


class TextEncoder(nn.Module):
    """Encodes prompts to tokens for the DiT's cross-attention; "" is the unconditional prompt.

    Args:
        config: Kind and sizes.
        path: Folder of the encoder and its tokenizer, for kind "transformers". Without it the model can be loaded,
            but no prompt can be encoded.

    Raises:
        UserError: The folder cannot be used.
    """

    TRAINED_AS = {"places": "no_decay"}

    def __init__(self, config: TextConfig, path: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.pretrained = None
        if config.kind == "words":
            # Row 0 is the null token; words with the same hash share a row.
            self.words = nn.Embedding(config.vocabulary + 1, config.dim)
            self.places = nn.Parameter(torch.empty(config.max_tokens, config.dim))
            nn.init.normal_(self.places, std=0.1)
        elif path is not None:
            self.tokenizer, self.pretrained = _load_pretrained(Path(path), config)

    def forward(self, prompts: list[str] | Words) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts.

        Args:
            prompts: B prompts, or the result of `cut`.

        Returns:
            Tokens (B, S, dim), and a bool mask (B, S), False for padding.

        Raises:
            UserError: The folder of the pretrained encoder was not given.
        """
        if self.config.kind == "words":
            return self._words(prompts)
        if self.pretrained is None:
            raise UserError("this model needs a pretrained text encoder; give its folder")
        device = next(self.pretrained.parameters()).device
        made = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            tokens = self.pretrained(input_ids=made.input_ids, attention_mask=made.attention_mask).last_hidden_state
        return tokens, made.attention_mask.bool()

    def train(self, mode: bool = True) -> TextEncoder:
        """Set the training mode; a pretrained encoder stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.pretrained is not None:
            self.pretrained.eval()
        return self

    def cut(self, prompts: list[str], length: int | None = None) -> Words:
        """Split prompts into words, for kind "words".

        Args:
            prompts: B prompts.
            length: Length S to pad to; by default that of the longest prompt.

        Returns:
            Word ids and mask, on the CPU.
        """
        rows = [word_rows(prompt, self.config.vocabulary)[: self.config.max_tokens] for prompt in prompts]
        longest = length or max(map(len, rows), default=1)
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
        return Words(padded, torch.tensor([[i < len(row) for i in range(longest)] for row in rows]))

    def _words(self, prompts: list[str] | Words) -> tuple[torch.Tensor, torch.Tensor]:
        rows, mask = prompts if isinstance(prompts, Words) else self.cut(prompts)
        device = self.places.device
        return self.words(rows.to(device)) + self.places[: rows.shape[1]], mask.to(device)


def require_encoder(config: TextConfig, path: str | Path | None, how: str) -> None:
    """Check, before any work, that the prompts of a model can be encoded.

    Args:
        config: Configuration of the text encoder.
        path: Folder of the pretrained encoder, or None.
        how: How the folder is given, for the message.

    Raises:
        UserError: The folder is required and was not given, or does not exist.
    """
    if config.kind != "transformers":
        return
    if path is None:
        raise UserError(f"this model needs a pretrained text encoder; give its folder {how}")
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; give the folder of the text encoder's config.json {how}")


def word_rows(prompt: str, vocabulary: int) -> list[int]:
    """Rows of the embedding table, in [1, vocabulary], of the words of a prompt; [0] if it has none."""
    # crc32 instead of hash(), which differs between processes.
    return [1 + zlib.crc32(word.encode()) % vocabulary for word in re.findall(r"\w+", prompt.lower())] or [0]


def _load_pretrained(path: Path, config: TextConfig) -> tuple[object, nn.Module]:
    try:
        import transformers
    except ImportError as error:
        raise UserError("a pretrained text encoder needs the package transformers: pip install transformers") from error
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of the text encoder's config.json")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        known = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        # Of T5 and UMT5 only the encoder is needed; AutoModel would load the decoder, too.
        kind = transformers.AutoModelForTextEncoding if known.is_encoder_decoder else transformers.AutoModel
        model = kind.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a damaged folder may raise any error inside transformers
        raise UserError(f"{path}: cannot be read as a text encoder with its tokenizer ({shorten(error)})") from error
    width = model.config.hidden_size
    if width != config.dim:
        raise UserError(
            f"{path}: its tokens have {width} channels, the model needs {config.dim}; give another text encoder"
        )
    return tokenizer, model.eval().requires_grad_(False)
