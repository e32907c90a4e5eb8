"""Read YAML files of users: errors name the line, and no file can take excessive time or memory to read.

Every use of an alias counts, depth and size are limited, and tags and duplicate keys are errors.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .checks import shorten, show
from .errors import UserError

_MOST_BYTES = 16 << 20
_MOST_NODES = 1_000_000
_MOST_VALUES = 200_000
_MOST_DEPTH = 32
_MOST_DIGITS = 1000
# libyaml, if PyYAML was built with it, is thirty times as fast as the parser in Python.
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PREFIX = "tag:yaml.org,2002:"
# 3e-4 is text in YAML 1.1; here it is a number, as in YAML 1.2.
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
_CONSTRUCT = yaml.constructor.SafeConstructor()


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Pause the garbage collector, which would visit all nodes repeatedly although they have no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UserError: The file is too large, or not UTF-8.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: has more than {_MOST_BYTES >> 20} MiB; give a YAML file of settings")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not UTF-8 text; save it as UTF-8") from error


def compose(text: str, name: str, otherwise: str = "not YAML", most: int = _MOST_NODES) -> yaml.Node | None:
    """Parse YAML to nodes, which know their line and column.

    Args:
        text: YAML text.
        name: File name for messages.
        otherwise: Message for a text that is not YAML.
        most: Maximum number of nodes; those of an alias count at every use.

    Returns:
        The root node, or None for an empty document.

    Raises:
        UserError: The text is not YAML or exceeds a limit; the message is "name:line:column: …".
    """
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        line = text.count("\n", 0, bad.start()) + 1
        raise UserError(f"{name}:{line}: contains a character that YAML does not allow")
    try:
        return _Composer(text, name, otherwise, most).compose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name, otherwise) from error
    except RecursionError as error:
        raise UserError(f"{name}: is nested too deeply") from error


def error_at(name: str, node: yaml.Node, what: str) -> UserError:
    """Make the error "name:line:column: what" for a node."""
    mark = node.start_mark
    return UserError(f"{name}:{mark.line + 1}:{mark.column + 1}: {what}")


@collector_off()
def load(text: str, name: str, otherwise: str = "is not YAML") -> tuple[Any, dict[str, int]]:
    """Parse YAML to plain values.

    Returns:
        The value, and the line of each part of it by its place, such as "model.encoders[0].compression".

    Raises:
        UserError: As for `compose`, or a mapping has a duplicate key.
    """
    lines: dict[str, int] = {}
    root = compose(text, name, otherwise, _MOST_VALUES)
    try:
        return (None if root is None else _Values(name, lines).of(root, "")), lines
    except RecursionError as error:  # aliases within aliases
        raise UserError(f"{name}: is nested too deeply") from error


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str, otherwise: str) -> UserError:
    if "nesting" in str(error.problem):  # libyaml's own limit
        return UserError(f"{name}: is nested too deeply")
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())] or line[mark.column : mark.column + 1] == "\t":
        what = "has a tab; indent YAML with spaces"
    else:
        what = f"{otherwise}: {shorten(error.problem or error.context).replace('in this context', 'here')}"
    return UserError(f"{name}:{mark.line + 1}:{mark.column + 1}: {what}")


class _Composer:
    """Composes parser events to nodes, without recursion."""

    def __init__(self, text: str, name: str, otherwise: str, most: int) -> None:
        self.text, self.name, self.otherwise, self.most = text, name, otherwise, most
        self.root: yaml.Node | None = None
        self.open: list[yaml.CollectionNode] = []
        self.count = 0
        self.begun: dict[str, int] = {}  # number of nodes at the start of each open anchor
        self.anchors: dict[str, tuple[yaml.Node, int]] = {}  # node of each anchor, and its number of nodes

    def compose(self) -> yaml.Node | None:
        """Compose the only document."""
        for event in yaml.parse(self.text, Loader=_Parser):
            if isinstance(event, yaml.ScalarEvent):
                if not event.value and event.implicit[0]:
                    event.start_mark = self.end_before(event.start_mark)
                self.add(event, _scalar(event))
            elif isinstance(event, yaml.CollectionStartEvent):
                mapping = isinstance(event, yaml.MappingStartEvent)
                kind, tag = (yaml.MappingNode, "map") if mapping else (yaml.SequenceNode, "seq")
                node = kind(_PREFIX + tag, [], event.start_mark)
                self.add(event, node)
                self.open.append(node)
                node.anchor = event.anchor
                if len(self.open) > _MOST_DEPTH:
                    raise UserError(f"{self.name}: is nested too deeply (more than {_MOST_DEPTH} levels)")
            elif isinstance(event, yaml.CollectionEndEvent):
                node = self.open.pop()
                if isinstance(node, yaml.MappingNode):  # keys and values alternate
                    node.value = list(zip(node.value[::2], node.value[1::2], strict=True))
                self.close(node.anchor, node)
            elif isinstance(event, yaml.AliasEvent):
                self.alias(event)
            elif isinstance(event, yaml.DocumentStartEvent) and self.root is not None:
                raise error_at(self.name, event, f"{self.otherwise}: but found another document")
        return self.root

    def end_before(self, mark: Any) -> yaml.Mark:
        """Position of a missing value: right after the token before, not at the next token."""
        lines = self.text.splitlines()
        before = lines[mark.line][: mark.column] if mark.line < len(lines) else ""
        return yaml.Mark(self.name, mark.index, mark.line, len(before.rstrip()), None, None)

    def add(self, event: yaml.NodeEvent, node: yaml.Node) -> None:
        if event.tag not in (None, "!"):
            raise error_at(
                self.name, event, f"tags such as {show(event.tag)} are not supported; write the value without the tag"
            )
        if event.anchor is not None:
            self.begun[event.anchor] = self.count
        self.put(node, 1, event)
        if isinstance(node, yaml.ScalarNode):
            self.close(event.anchor, node)

    def put(self, node: yaml.Node, size: int, event: yaml.Event) -> None:
        self.count += size
        if self.count > self.most:
            raise error_at(
                self.name,
                event,
                f"has more than {self.most:,} entries (aliases count at every use); make the file smaller",
            )
        if self.open:
            self.open[-1].value.append(node)
        elif self.root is None:
            self.root = node

    def close(self, anchor: str | None, node: yaml.Node) -> None:
        if anchor is not None:
            self.anchors[anchor] = node, self.count - self.begun.pop(anchor, self.count)

    def alias(self, event: yaml.AliasEvent) -> None:
        if event.anchor in self.begun or event.anchor not in self.anchors:
            raise error_at(self.name, event, f"the alias {show(event.anchor)} has no anchor before it")
        self.put(*self.anchors[event.anchor], event)


def _scalar(event: yaml.ScalarEvent) -> yaml.ScalarNode:
    value, tag = event.value, "str"
    if event.implicit[0]:  # neither quoted nor tagged
        for name, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(value[:1], ()):
            if pattern.match(value):
                tag = name.removeprefix(_PREFIX)
                break
        if tag == "str" and _EXPONENT.fullmatch(value):
            tag = "float"
    return yaml.ScalarNode(_PREFIX + tag, value, event.start_mark)


class _Values:
    """Converts nodes to plain values and records their lines."""

    def __init__(self, name: str, lines: dict[str, int]) -> None:
        self.name, self.lines = name, lines

    def of(self, node: yaml.Node, place: str) -> Any:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.of(each, f"{place}[{i}]") for i, each in enumerate(node.value)]
        kind = node.tag.removeprefix(_PREFIX)
        if kind in ("int", "float") and len(node.value) > _MOST_DIGITS:
            raise error_at(self.name, node, f"{place}: a number of {len(node.value):,} digits is too long")
        if kind in ("null", "bool", "int", "float"):
            with contextlib.suppress(ValueError, OverflowError):  # as 0x_, or 1:1:…:1.5
                return getattr(_CONSTRUCT, f"construct_yaml_{kind}")(node)
        return node.value  # dates, too, which no setting uses

    def mapping(self, node: yaml.MappingNode, place: str) -> dict[Any, Any]:
        made: dict[Any, Any] = {}
        first: dict[Any, int] = {}
        merges: list[yaml.Node] = []
        for key, value in node.value:
            if key.tag == _PREFIX + "merge":
                merges.append(value)
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise error_at(self.name, key, f"a key must be text, got a {key.id}")
            name, line = self.of(key, ""), key.start_mark.line + 1
            inside = f"{place}.{name}".lstrip(".") if isinstance(name, str) else place
            if name in first:
                raise error_at(
                    self.name, key, f"the key {show(inside)} is given twice, on line {first[name]} and on line {line}"
                )
            first[name] = line
            self.lines.setdefault(inside, line)
            made[name] = self.of(value, inside)
        for merge in merges:  # after the keys of the mapping itself, whose lines take precedence
            for given in self.merged(merge, place):
                made = {**given, **made}
        return made

    def merged(self, value: yaml.Node, place: str) -> list[dict[Any, Any]]:
        """Convert the mappings of a merge key `<<`."""
        nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for node in nodes:
            if not isinstance(node, yaml.MappingNode):
                raise error_at(self.name, node, "<< must be followed by mappings")
        return [self.mapping(node, place) for node in nodes]
