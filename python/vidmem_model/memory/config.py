"""How a clip is compressed to a memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..checks import Checked, Former, OneOf, Text, positive, require
from ..model.config import Compression
from . import METHODS, MethodName, listed, takers, trained

ROW_DTYPES = ("float16", "float32", "float8", "int8")


@dataclass(frozen=True)
class CompressorConfig(Checked):
    """How a clip's patch tokens become a short context.

    Args:
        method: one of memory.METHODS: "dct" (one row a box, its strongest low frequencies), "merge" (token
            merging, then sparsification) or "learned" (a trained model, whose compression and width are fixed).
        compression: patch tokens of a box. It fixes the number of rows of dct, and of merge where `budget` is not
            given.
        channels: width of a dct row; a merge row is as wide as a patch token.
        budget: number of rows of merge.
        dtype: how rows are stored: float16, float32, or float8 and int8 with one scale a row.
        model: of learned, a checkpoint that comes with the package; by default the one trained to give frames back.

    Raises:
        ValueError: a value is out of range, or one is given that the method does not take.
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
        fixed = f"; the compression fixes the rows of {self.method}" if "compression" in method.takes else ""
        require(
            self.budget is None or "budget" in method.takes,
            f"CompressorConfig: budget belongs to method {listed(takers('budget'), 'and')}{fixed}",
            self.budget,
        )
        require(
            self.model is None or method.model is not None,
            f"CompressorConfig: model belongs to method {listed(trained(), 'and')}",
            self.model,
        )

    @property
    def model_name(self) -> str | None:
        """The checkpoint that the method runs; None for a method without one."""
        return self.model or METHODS[self.method].model
