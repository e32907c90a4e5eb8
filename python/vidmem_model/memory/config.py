"""The configuration of `compress`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checks import Checked, Former, OneOf, Text, positive, require
from ..model.config import Compression
from . import METHODS, MethodName, listed, takers, trained

ROW_DTYPES = ("float16", "float32", "float8", "int8")


@dataclass(frozen=True)
class CompressorConfig(Checked):
    """Compression method and storage format of a memory.

    Args:
        method: "dct" (one memory token per box: its strongest low DCT frequencies), "merge" (token merging, then
            sparsification) or "learned" (a trained model, whose compression and channels are fixed).
        compression: Patch tokens per memory token. It sets the number of tokens of dct, and of merge without `budget`.
        channels: Channels of a dct token. A merge token has the channels of a patch token.
        budget: Number of tokens of merge.
        dtype: Storage format of the tokens: "float16", "float32", or "float8" and "int8" with one scale per token.
        model: Name of a shipped checkpoint, for learned; None for the default one.

    Raises:
        ValueError: A value is out of range, or the method does not use it.
    """

    FORMER: ClassVar[dict[str, Former]] = {"rate": Former("compression", Compression.of_rate)}

    method: MethodName = "dct"
    compression: Compression = Compression()
    channels: Annotated[int, positive(1 << 20)] = 3072
    budget: Annotated[int | None, positive(1 << 31)] = None
    dtype: Annotated[str, OneOf(*ROW_DTYPES)] = "float16"
    model: Annotated[str | None, Text(256)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        method = METHODS[self.method]
        fixed = f" (the compression sets the number of {self.method} tokens)" if "compression" in method.takes else ""
        require(
            self.budget is None or "budget" in method.takes,
            f"CompressorConfig: budget requires method {listed(takers('budget'), 'or')}{fixed}",
            self.budget,
        )
        require(
            self.model is None or method.model is not None,
            f"CompressorConfig: model requires method {listed(trained(), 'or')}",
            self.model,
        )

    @property
    def model_name(self) -> str | None:
        """Name of the checkpoint that the method runs; None for a method without one."""
        return self.model or METHODS[self.method].model
