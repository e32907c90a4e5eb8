"""What an API page shows, from the line in it that asks for it; read from the sources, without an import of them.

::: vidmem_kernels.rotary                                        one object
<!-- every public name of vidmem_kernels.sparse_gather.api -->   all of a module's __all__: functions, then classes
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUMMARY = "<!-- summary -->"
_EVERY = re.compile(r"^<!-- every public name of ([\w.]+) -->$", re.MULTILINE)
_ONE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def with_every_name(markdown: str) -> str:
    """The page with a line `::: name` for every name that it asks for."""
    return _EVERY.sub(lambda match: "\n\n".join(f"::: {name}" for name in _public(match[1])), markdown)


def names(markdown: str) -> list[str]:
    """Full names of the objects that a page shows, in order."""
    return _ONE.findall(with_every_name(markdown))


def _public(module: str) -> list[str]:
    package = module.split(".")[0]
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    (listed,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] == ["__all__"]
    )
    order = {name: number for number, name in enumerate(re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE))}
    listed = sorted(listed, key=lambda name: (name[0].isupper(), order.get(name, len(order))))
    return [f"{package}.{name}" for name in listed]
