"""Writes the generated parts of README.md and docs/, so that no number on them can be out of date.

    python benchmarks/pages.py            # rewrites the parts that differ, and names them
    python benchmarks/pages.py --check    # changes nothing; exits 1 where a part differs

A part stands between the lines <!-- NAME:begin --> and <!-- NAME:end -->. It comes from committed files alone: from
result files and from the code. What stands around it is written by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks import benchmark_page, integrations_tables, model_page, op_table  # noqa: E402
from benchmarks.page_parts import with_part  # noqa: E402


class Part(NamedTuple):
    """A part of a page.

    Attributes:
        page: from the root of the repository.
        name: of its marks.
        make: root of the repository -> Markdown.
    """

    page: str
    name: str
    make: Callable[[Path], str]


PARTS = (
    Part("README.md", "ops", op_table.short),
    Part("docs/backends.md", "ops", op_table.full),
    Part("docs/benchmarks.md", "results", benchmark_page.tables),
    Part("docs/benchmarks.md", "lengths", benchmark_page.lengths),
    Part("benchmarks/README.md", "files", benchmark_page.files),
    Part("docs/integrations.md", "merging", integrations_tables.newest),
    Part("docs/model.md", "model", model_page.shipped),
    Part("docs/retrieval.md", "retrieval", model_page.retrieval),
    Part("docs/cost.md", "cost", model_page.cost),
    Part("docs/cost.md", "kept", model_page.kept),
)


def written(root: Path, part: Part) -> tuple[str, str]:
    """A page as it is, and with one part made anew from the files below a root.

    Raises:
        ValueError: the page does not have the part; names the page.
    """
    page = (root / part.page).read_text(encoding="utf-8")
    try:
        return page, with_part(page, part.name, part.make(root))
    except ValueError as error:
        raise ValueError(f"{part.page}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a part differs")
    args = parser.parse_args(argv)
    differ = False
    for part in PARTS:
        page, made = written(ROOT, part)
        if page == made:
            continue
        differ = True
        print(f"{part.page}: {part.name} {'differs' if args.check else 'written'}")
        if not args.check:
            (ROOT / part.page).write_text(made, encoding="utf-8")
    return int(args.check and differ)


if __name__ == "__main__":
    sys.exit(main())
