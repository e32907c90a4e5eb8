"""Extension of griffe, which reads the docstrings for the site: their code becomes code blocks.

In the docstrings code is indented under `Example:` and `Equivalent PyTorch:`, as `help()` shows it best. Markdown would
take that for a paragraph.
"""

import re

import griffe

_CODE = re.compile(
    r"^((?:Example|Equivalent PyTorch)\b[^\n:]*:)\n((?:[ \t]+\S.*(?:\n|\Z)|[ \t]*\n(?=[ \t]+\S))+)", re.MULTILINE
)


def with_fences(docstring: str) -> str:
    """The docstring with a fence around the code under its titles."""

    def fenced(match: re.Match) -> str:
        title, code = match.groups()
        language = "pycon" if code.lstrip().startswith(">>>") else "python"
        return f"{title}\n    ```{language}\n{code.rstrip()}\n    ```\n"

    return _CODE.sub(fenced, docstring)


class CodeInDocstrings(griffe.Extension):
    """Applies `with_fences` to every docstring that is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = with_fences(obj.docstring.value)
