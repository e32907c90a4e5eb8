"""Configurations of the memory pipeline: what to take from a video and how to compress it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..checks import Checked, OneOf, positive, require
from ..model.config import Rate

METHODS = ("dct", "merge")
ROW_DTYPES = ("float16", "float32", "float8", "int8")


@dataclass(frozen=True)
class CompressorConfig(Checked):
    """How a clip's patch tokens become a short context.

    Args:
        method: "dct" (one row a box, its strongest low frequencies) or "merge" (token merging,
            then sparsification).
        rate: patch tokens a box covers along height, width and time. It fixes the number of rows
            of dct, and of merge where `budget` is not given.
        channels: width of a dct row; a merge row is as wide as a patch token.
        budget: number of rows of merge.
        dtype: how rows are stored: float16, float32, or float8 and int8 with one scale a row.

    Raises:
        ValueError: a value is out of range, or `budget` is given with method "dct".
    """

    method: Annotated[str, OneOf(*METHODS)] = "dct"
    rate: Rate = (4, 4, 2)
    channels: Annotated[int, positive(1 << 20)] = 3072
    budget: Annotated[int | None, positive(1 << 31)] = None
    dtype: Annotated[str, OneOf(*ROW_DTYPES)] = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.budget is None or self.method == "merge",
            "CompressorConfig: budget belongs to method merge; the rate fixes the rows of dct",
            self.budget,
        )
