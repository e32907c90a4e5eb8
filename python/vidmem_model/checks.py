"""Check the fields of configurations and file headers against bounds that are declared with each field.

A field declares its bounds in one line:

    depth: Annotated[int, positive(10_000)] = 4

`Checked`, the base of all such dataclasses, checks every field when an object is made; `build` makes an object from the
values of a YAML or JSON file. A class checks rules between fields in its `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

# Lengths, sizes and rates beyond these are mistakes in any field.
MOST_SECONDS = 10_000_000
MOST_PIXELS = 16_384
MOST_FPS = 100_000
MOST_WIDTH = 1 << 17
MOST_SEED = (1 << 63) - 1
_MOST_SHOWN = 80
_MOST_JSON_NESTING = 32


class FieldError(ValueError):
    """A field has a wrong value.

    Attributes:
        place: Place of the field in its file, such as "model.encoders[0].compression".
    """

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


class _Shown(reprlib.Repr):
    """repr of a value, shortened if it is long, wide or deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 2, 6, 6, 4, 4
        self.maxstring = self.maxother = _MOST_SHOWN

    def repr_int(self, value: int, level: int) -> str:
        # Python raises for numbers of more than 4,300 digits.
        return repr(value) if abs(value) < 10**20 else f"{'-' if value < 0 else ''}{_digits(value)} digits"


def _digits(value: int) -> str:
    return f"about {round(value.bit_length() * math.log10(2)):,}"


_SHOWN = _Shown()


def show(value: object) -> str:
    """Format a value for a message: its repr, on one line, at most 80 characters."""
    return shorten(_SHOWN.repr(value), _MOST_SHOWN)


def shorten(text: object, most: int = 200) -> str:
    """Format a text for a message: on one line, at most `most` characters."""
    # Only the beginning of a long text is processed.
    line = " ".join(str(text)[: 4 * most].split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= most else line[: most - 2] + " …"


def require(holds: bool, what: str, got: object) -> None:
    """Raise ValueError("<what>, got <got>") unless it holds."""
    if not holds:
        raise ValueError(f"{what}, got {show(got)}")


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of every number in a list.

    Args:
        least: Minimum.
        most: Maximum.
        above: Whether the minimum itself is excluded.
        below: Whether the maximum itself is excluded.
        words: Message for a number that is too small or not finite, such as "must be positive".
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    words: str = ""

    def problem(self, value: Any) -> str | None:
        """What `value` must be and is not, or None."""
        # Written with `not`, because NaN makes every comparison false.
        if not (value > self.least if self.above else value >= self.least) or value == math.inf:
            return self.words
        if not (value < self.most if self.below else value <= self.most):
            most = f"{self.most:,}".removesuffix(".0")
            return self.words if self.words.startswith("must be in") else f"must be at most {most}"
        return None


def positive(most: float, unit: str = "") -> Range:
    """Above 0 and at most `most`; `unit` is for messages, such as "seconds"."""
    return Range(0, most, above=True, words=f"must be positive {unit}".rstrip())


def not_negative(most: float) -> Range:
    """0 to `most`."""
    return Range(0, most, words="must not be negative")


def at_least(least: float, most: float, unit: str = "") -> Range:
    """`least` to `most`; `unit` is for messages, such as "seconds"."""
    return Range(least, most, words=f"must be at least {least} {unit}".rstrip())


def more_than(least: float, most: float) -> Range:
    """Above `least` and at most `most`."""
    return Range(least, most, above=True, words=f"must be greater than {least}")


def within(least: float, most: float, below: bool = False) -> Range:
    """`least` to `most`, shown as an interval in messages; `below` excludes the upper end."""
    return Range(least, most, below=below, words=f"must be in [{least}, {most}{')' if below else ']'}")


class OneOf:
    """One of several names, given as arguments or as the keys of a mapping."""

    def __init__(self, *choices: str | Mapping[str, Any]) -> None:
        self._choices = choices[0] if isinstance(choices[0], Mapping) else choices

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self._choices)

    def problem(self, value: Any) -> str | None:
        """What `value` must be and is not, or None."""
        return None if value in self.choices else f"must be one of {', '.join(self.choices)}"


@dataclass(frozen=True)
class Text:
    """A text of `least` to `most` characters without NUL."""

    most: int
    least: int = 0

    def problem(self, value: Any) -> str | None:
        """What `value` must be and is not, or None."""
        text = str(value)
        if len(text) < self.least:
            return "must not be empty"
        if len(text) > self.most:
            return f"must have at most {self.most:,} characters"
        return None if "\0" not in text else "must not contain a NUL character"


class PathName(Text):
    """A valid path of a file."""

    def __init__(self) -> None:
        super().__init__(4096, least=1)

    def problem(self, value: Any) -> str | None:
        """What `value` must be and is not, or None."""
        if any(len(name.encode("utf-8", "surrogatepass")) > 255 for name in str(value).split("/")):
            return "must have names of at most 255 bytes"
        return super().problem(value)


@dataclass(frozen=True)
class Entries:
    """A list of `least` to `most` entries."""

    least: int
    most: int

    def problem(self, value: Sequence[Any]) -> str | None:
        """What `value` must be and is not, or None."""
        if len(value) < self.least:
            return "must not be empty" if not value else f"must have at least {self.least} entries"
        return None if len(value) <= self.most else f"must have at most {self.most:,} entries"


FileName = Annotated[str, PathName()]
SamplerSteps = Annotated[int, positive(10_000)]
# Lengths of a history, in seconds.
Lengths = Annotated[tuple[float, ...], Entries(1, 100), at_least(0.001, MOST_SECONDS, "seconds")]


class Checked:
    """Base of dataclasses whose fields are checked against their declarations.

    Numbers and lists are converted to the declared types: 1 becomes 1.0 in a float field, a list becomes a tuple.

    Raises:
        FieldError: A field is wrong; the message is "<class>: <field> must …, got …".
    """

    def __post_init__(self) -> None:
        for name, hint in declarations(type(self)).items():
            value = getattr(self, name)
            object.__setattr__(self, name, conform(hint, value, f"{type(self).__name__}: {name}", name))


@functools.cache
def declarations(kind: type) -> dict[str, Any]:
    """The declared type of every field of a dataclass, including bounds."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def conform(hint: Any, value: Any, what: str, place: str = "", bounds: tuple = ()) -> Any:
    """Check a value against a declaration and convert it to the declared type.

    Args:
        hint: A type, or Annotated with bounds. Entries applies to a list, other bounds to a value or to each entry of
            a list.
        value: The value.
        what: Name of the value in messages.
        place: Place of the value in its file.
        bounds: Bounds of the enclosing declaration.

    Returns:
        The value in the declared type.

    Raises:
        FieldError: The value has another type or is out of bounds.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return conform(inner[0], value, what, place, (*bounds, *inner[1:]))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, (hint, dict)):
            raise FieldError(f"{what}: must be a mapping of keys to values, got {show(value)}", place)
        return build(hint, value, place) if isinstance(value, dict) else value
    if type(None) in inner:  # X | None
        others = next(each for each in inner if each is not type(None))
        return None if value is None else conform(others, value, what, place, bounds)
    if origin is tuple:
        return _conform_list(inner, value, what, place, bounds)
    if hint is float and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if hint is Path and isinstance(value, str):
        value = Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        if (words := _words(bounds)) and isinstance(value, (int, float)):
            raise FieldError(f"{what} {words}, got {show(value)}", place)
        raise FieldError(f"{what}: must be of type {hint.__name__}, got {show(value)}", place)
    _hold(bounds, value, what, place, value)
    return value


def _conform_list(inner: tuple, value: Any, what: str, place: str, bounds: tuple) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise FieldError(f"{what}: must be a list, got {show(value)}", place)
    whole = [bound for bound in bounds if isinstance(bound, Entries)]
    each = tuple(bound for bound in bounds if not isinstance(bound, Entries))
    free = inner[-1] is Ellipsis
    if not free and len(value) != len(inner):
        raise FieldError(f"{what}: must have {len(inner)} entries, got {show(value)}", place)
    shown = list(value) if free else tuple(value)
    if not value:  # the message about its entries is clearer
        whole = [dataclasses.replace(bound, least=0) if _words(each) else bound for bound in whole]
        if whole != [bound for bound in bounds if isinstance(bound, Entries)]:
            raise FieldError(f"{what} {_words(each)}, got {show(shown)}", place)
    _hold(whole, value, what, place, shown)
    kinds = [inner[0]] * len(value) if free else inner
    plain = not any(typing.get_args(kind) or dataclasses.is_dataclass(kind) for kind in inner if kind is not Ellipsis)
    made = []
    for i, (kind, entry) in enumerate(zip(kinds, value, strict=True)):
        made.append(conform(kind, entry, f"{what}[{i}]", f"{place}[{i}]", () if plain else each))
        if plain:  # show a short list as a whole
            _hold(each, made[-1], what, place, shown if len(value) <= 6 else entry)
    return tuple(made)


def _words(bounds: tuple) -> str:
    return next((bound.words for bound in bounds if isinstance(bound, Range)), "")


def _hold(bounds: Sequence[Any], value: Any, what: str, place: str, shown: Any) -> None:
    for bound in bounds:
        problem = bound.problem(value)
        if problem:
            raise FieldError(f"{what} {problem}, got {show(shown)}", place)


def build(kind: type, values: Any, where: str = "") -> Any:
    """Build a dataclass from plain, possibly nested, dicts and lists.

    Args:
        kind: The dataclass.
        values: Its fields by name; former names (`Former`) are accepted.
        where: Place of `values` in its file, for messages.

    Returns:
        An instance of `kind`.

    Raises:
        FieldError: A key is unknown, or a value has another type than its field or is out of range.
    """
    name = where or kind.__name__
    if not isinstance(values, dict):
        raise FieldError(f"{name}: must be a mapping of keys to values, got {show(values)}", where)
    values, given_as = _renamed(kind, values, where)
    types = _types(kind)
    for key in values:
        if key not in types:
            place = f"{where}.{key}".lstrip(".") if isinstance(key, str) else where
            raise FieldError(f"{name}: keys must be among {sorted(types)}, got {show(key)}", place)
    places = {key: f"{where}.{given_as.get(key, key)}".lstrip(".") for key in values}
    given = {key: conform(types[key], value, places[key], places[key]) for key, value in values.items()}
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise FieldError(f"{name}: needs {missing}, got {show(sorted(values))}", where)
    try:
        return kind(**given)
    except FieldError as error:  # out of bounds: the class knows the field only, not its place in the file
        field = re.match(r"\w*", error.place).group()
        place = f"{where}.{given_as.get(field, field)}{error.place[len(field) :]}".lstrip(".")
        raise FieldError(f"{place}: {error}", place) from error
    except ValueError as error:  # a rule between fields
        raise FieldError(f"{where}: {error}" if where else str(error), where) from error


@dataclass(frozen=True)
class Former:
    """A former name of a field, which old files may still contain: an entry of the dict FORMER of a dataclass.

    Args:
        name: Present name of the field; None if the field was removed.
        convert: Converts the former value to the present one; raises ValueError if there is no such value.
    """

    name: str | None
    convert: Callable[[Any], Any] = lambda value: value


def renewed(kind: type, values: Any, where: str = "") -> Any:
    """Replace former names of fields by their present names, in nested dicts and lists.

    Args:
        kind: The dataclass.
        values: Some or all of its fields. Unknown keys, and values of other types, stay unchanged.
        where: Place of `values` in its file, for messages.

    Returns:
        The values with the present names.

    Raises:
        FieldError: A field is given by both names, or its former value cannot be converted.
    """
    if isinstance(values, (list, tuple)):
        return [renewed(kind, value, f"{where}[{i}]") for i, value in enumerate(values)]
    if not isinstance(values, dict):
        return values
    parts = _parts(kind)
    made, _ = _renamed(kind, values, where)
    return {k: renewed(parts[k], v, f"{where}.{k}".lstrip(".")) if k in parts else v for k, v in made.items()}


def former_names(kind: type, values: Any, where: str = "") -> Iterator[tuple[str, str | None]]:
    """Find fields that are given by their former names.

    Args:
        kind: The dataclass.
        values: Some or all of its fields, as plain dicts and lists.
        where: Place of `values` in its file.

    Yields:
        The place of each such field, and its present name, or None if it has none.
    """
    if isinstance(values, (list, tuple)):
        for i, value in enumerate(values):
            yield from former_names(kind, value, f"{where}[{i}]")
    elif isinstance(values, dict):
        former, parts = getattr(kind, "FORMER", {}), _parts(kind)
        for key, value in values.items():
            place = f"{where}.{key}".lstrip(".")
            if key in former:
                yield place, former[key].name
            elif key in parts:
                yield from former_names(parts[key], value, place)


def _renamed(kind: type, values: dict[Any, Any], where: str) -> tuple[dict[Any, Any], dict[str, str]]:
    """The fields by their present names, and a map from present to former names of those given by former names."""
    former, made, given_as = getattr(kind, "FORMER", {}), {}, {}
    for key, value in values.items():
        if key not in former:
            made[key] = value
            continue
        name, place = former[key].name, f"{where}.{key}".lstrip(".")
        if name is not None and name in values:
            raise FieldError(f"{place}: is the former name of {name}; give only {name}, got both", place)
        try:
            value = former[key].convert(value)
        except ValueError as error:
            raise FieldError(f"{place}: {error}", place) from error
        if name is not None:
            made[name], given_as[name] = value, key
    return made, given_as


@functools.cache
def _parts(kind: type) -> dict[str, type]:
    """Fields that are dataclasses or lists of dataclasses."""
    found = {}
    for name, hint in _types(kind).items():
        for each in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(each):
                found[name] = each
    return found


def parse_json(text: str, what: str) -> Any:
    """Parse JSON from a file.

    Args:
        text: JSON text.
        what: Name of the text in messages.

    Returns:
        The parsed value.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or has a key twice in an object; the message is short.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"{what} has the key {show(twice)} twice")
        return made

    if not isinstance(text, str):
        raise ValueError(f"{what} must be JSON, got {show(text)}")
    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is not JSON ({error.msg} at character {error.pos})") from error
    except ValueError as error:  # such as Python's error for a number of 5,000 digits
        raise ValueError(error.args[0] if str(error).startswith(what) else f"{what} holds {shorten(error)}") from error
    if _nesting(parsed) > _MOST_JSON_NESTING:
        raise ValueError(f"{what} is nested too deeply")
    return parsed


def _nesting(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= _MOST_JSON_NESTING:
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level, depth = [inner for values in inside for inner in values], depth + 1
    return depth
