"""Field declarations: every field is bounded, and a value out of bounds gives one short line."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_model
from vidmem_model import checks, yaml_file
from vidmem_model.checks import Checked, Entries, FieldError, OneOf, Range, Text, build, parse_json, show
from vidmem_model.errors import UserError
from vidmem_model.model.config import PRESETS, ModelConfig
from vidmem_model.train.recipe import read_pretrain

for module in pkgutil.walk_packages(vidmem_model.__path__, "vidmem_model."):
    if "__main__" not in module.name:
        importlib.import_module(module.name)

KINDS = sorted(Checked.__subclasses__(), key=lambda kind: kind.__name__)
FIELDS = [(kind, name) for kind in KINDS for name in checks.declarations(kind)]
LONGEST = 300
# Fields that a rule ties to others: an end of their range needs the others changed as well.
TIED = {
    ("ClipSpec", "height"),
    ("ClipSpec", "width"),
    ("CompressorConfig", "budget"),
    ("ContinuationConfig", "history"),
    ("ContinuationConfig", "window"),
    ("CostConfig", "depth"),
    ("DataConfig", "captions"),
    ("DataConfig", "start"),
    ("DataConfig", "test"),
    ("DataConfig", "videos"),
    ("DiTConfig", "dim"),
    ("DiTConfig", "heads"),
    ("DiTConfig", "linear_blocks"),
    ("DiTConfig", "lora_rank"),
    ("EncoderConfig", "channels"),
    ("EncoderConfig", "heads"),
    ("ModelConfig", "height"),
    ("ModelConfig", "width"),
    ("PretrainConfig", "lora_rank"),
    ("PretrainVAEConfig", "frames"),
    ("QueryConfig", "history"),
    ("QueryConfig", "queries"),
    ("VAEConfig", "stride"),
}


def parts(hint, bounds=()):
    """The leaves of a declared type with their bounds."""
    if typing.get_origin(hint) is typing.Annotated:
        return parts(hint.__origin__, (*bounds, *hint.__metadata__))
    if type(None) in typing.get_args(hint):
        return [leaf for each in typing.get_args(hint) if each is not type(None) for leaf in parts(each, bounds)]
    if typing.get_origin(hint) is tuple:
        inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
        own = [(hint, bounds)] if Ellipsis in typing.get_args(hint) else []
        return own + [leaf for each in inner for leaf in parts(each, [b for b in bounds if not isinstance(b, Entries)])]
    return [(hint, bounds)]


def example(hint, bounds=()):
    """A value that fits."""
    if typing.get_origin(hint) is typing.Annotated:
        return example(hint.__origin__, (*bounds, *hint.__metadata__))
    args = typing.get_args(hint)
    if type(None) in args:
        return None
    if typing.get_origin(hint) is tuple:
        return tuple(example(each, bounds) for each in args if each is not Ellipsis)
    if dataclasses.is_dataclass(hint):
        return made(hint)
    for bound in bounds:
        if isinstance(bound, OneOf):
            return bound.choices[0]
        if isinstance(bound, Range):
            return hint(min(bound.least + 1, bound.most))
    return {str: "x", bool: False, Path: Path("x"), int: 1, float: 1.0}[hint]


def made(kind):
    missing = dataclasses.MISSING
    needed = [f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing]
    hints = checks.declarations(kind)
    given = {name: PRESETS["tiny"] if hints[name] is ModelConfig else example(hints[name]) for name in needed}
    return kind(**given)


def test_all_configurations_are_checked():
    """Every class named Config or Spec derives from Checked."""
    named = {
        value
        for module in pkgutil.walk_packages(vidmem_model.__path__, "vidmem_model.")
        if "__main__" not in module.name
        for value in vars(importlib.import_module(module.name)).values()
        if dataclasses.is_dataclass(value) and isinstance(value, type) and re.search(r"(Config|Spec)$", value.__name__)
    }
    assert len(named) > 12
    assert all(issubclass(kind, Checked) for kind in named), [k.__name__ for k in named if not issubclass(k, Checked)]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_field_has_a_bound(kind, name):
    for leaf, bounds in parts(checks.declarations(kind)[name]):
        if typing.get_origin(leaf) is tuple:
            assert any(isinstance(bound, Entries) for bound in bounds), "how many entries?"
        elif leaf is not bool and not dataclasses.is_dataclass(leaf):
            wanted = (Range,) if leaf in (int, float) else (Text, OneOf)
            assert any(isinstance(bound, wanted) for bound in bounds), f"{leaf} without a bound"


NESTED = {"a": [[[[["b"] * 100] * 100] * 100]]}
WRONG_TYPES = [
    None,
    True,
    "1",
    "x" * 10_000,
    "a\0b",
    [],
    [[]],
    [1] * 5000,
    {},
    NESTED,
    b"1",
    1.5,
    7,
    math.nan,
    "\x1b[2J",
]
NUMBERS = [0, -1, -32, 10**18, 10**400, 10**5000, math.nan, math.inf, -math.inf, 1e308, -1e-300, 1e-300, True]


def refuses(kind, name, value):
    """Whether the field refuses a value; the message must be one short line."""
    try:
        dataclasses.replace(made(kind), **{name: value})
    except ValueError as error:
        message = str(error)
        assert len(message) < LONGEST and message.isprintable(), message
        assert ", got " in message and (isinstance(value, dict) or message.startswith(f"{kind.__name__}: ")), message
        return True
    return False


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_bad_values_are_refused_in_a_short_line(kind, name):
    leaves = parts(checks.declarations(kind)[name])
    optional = type(None) in typing.get_args(checks.declarations(kind)[name]) or getattr(
        checks.declarations(kind)[name], "__origin__", None
    ) == (str | None)
    wide = any(typing.get_origin(leaf) is tuple for leaf, _ in leaves) or len(leaves) > 1
    for value in WRONG_TYPES:
        refuses(kind, name, value)  # a wrong type for one is a right one for another: only the message counts
    for leaf, bounds in leaves:
        if typing.get_origin(leaf) is tuple or wide:
            continue
        if leaf in (int, float):
            assert refuses(kind, name, "1") and refuses(kind, name, True) and refuses(kind, name, [1])
            assert refuses(kind, name, math.nan) and refuses(kind, name, math.inf)
            assert refuses(kind, name, 10**5000) and refuses(kind, name, -(10**18))
            if leaf is int:
                assert refuses(kind, name, 1.5)
        elif leaf is str:
            assert refuses(kind, name, 1) and refuses(kind, name, "x" * 20_000)
            if any(isinstance(bound, Text) for bound in bounds):
                assert refuses(kind, name, "a\0b")
        elif leaf is bool:
            assert refuses(kind, name, 1) and refuses(kind, name, "yes")
        elif leaf is not Path:
            assert refuses(kind, name, []) and refuses(kind, name, 3)
    if not optional and not any(leaf is Path for leaf, _ in leaves):
        typed = checks.declarations(kind)[name]
        if "None" not in str(typed):
            assert refuses(kind, name, None)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, name in FIELDS if (kind.__name__, name) not in TIED],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_ends_of_a_range_are_accepted(kind, name):
    hint = checks.declarations(kind)[name]
    leaves = parts(hint)
    if len(leaves) != 1:
        return
    ((leaf, bounds),) = leaves
    for bound in bounds:
        if isinstance(bound, Range):
            step = 1 if leaf is int else 1e-9
            ends = [bound.least + step * bound.above, bound.most - step * bound.below, (bound.least + bound.most) / 2]
            for end in ends:
                assert getattr(dataclasses.replace(made(kind), **{name: leaf(end)}), name) == leaf(end)
            assert refuses(kind, name, leaf(bound.most) + (1 if leaf is int else bound.most + 1))
            assert refuses(kind, name, bound.least - 1 if leaf is int else -1.0 - bound.least)
        if isinstance(bound, OneOf):
            assert refuses(kind, name, bound.choices[0] + "t")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_values_make_a_configuration_or_one_line(data):
    """Random JSON at a random place of a configuration's plain form."""
    kind = data.draw(st.sampled_from(KINDS))
    plain = json.loads(json.dumps(dataclasses.asdict(made(kind)), default=str))
    number = st.integers(0, len(NUMBERS) - 1).map(lambda i: NUMBERS[i]) | st.integers() | st.floats()
    leaf = number | st.none() | st.booleans() | st.text(max_size=20)
    value = data.draw(st.recursive(leaf, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner)))
    at = plain
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = data.draw(st.sampled_from([*keys, "zz"] if isinstance(at, dict) else keys))
        inner = at.get(key) if isinstance(at, dict) else at[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            at[key] = value
            break
        at = inner
    try:
        assert isinstance(build(kind, plain), kind)
    except FieldError as error:
        assert len(str(error)) < 2 * LONGEST and str(error).isprintable()
        assert error.place is not None


def test_default_configurations_are_built_from_their_plain_form():
    for kind in KINDS:
        config = made(kind)
        assert build(kind, json.loads(json.dumps(dataclasses.asdict(config), default=str))) == config
    for preset in PRESETS.values():
        assert ModelConfig.from_dict(preset.to_dict()) == preset


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.integers() | st.text() | st.floats() | st.binary(), lambda inner: st.lists(inner) | st.sets(st.text())
    )
)
def test_shown_values_are_short(value):
    assert len(show(value)) <= 80 and show(value).isprintable()


def test_long_values_are_cut_before_they_are_written():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    wide = {str(i): ["x" * 1000] * 1000 for i in range(1000)}
    for value in (deep, wide, 10**5000, -(10**100_000), "x" * 10**8, b"x" * 10**7, "\x00\x1b\n\ud800"):
        assert len(show(value)) <= 80 and show(value).isprintable()
    assert show(-(10**5000)) == "-about 5,000 digits"
    assert show([1.0, math.nan]) == "[1.0, nan]" and show("it's") == '"it\'s"'
    while deep:  # not by the recursion of its destructor
        deep = deep[0]


BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "r:6:15: has more than 200,000 entries (aliases count at every use)"),
        ("a: &x [*x]", "r:1:8: the alias 'x' has no anchor before it"),
        ("a: *x", "r:1:4: the alias 'x' has no anchor"),
        ("a: 1\nb: 2\na: 3", "r:3:1: the key 'a' is given twice, on line 1 and on line 3"),
        ("m: {a: 1,\n d: 2, a: 3}", "r:2:8: the key 'm.a' is given twice, on line 1 and on line 2"),
        ("a: !!int abc", "r:1:4: tags such as 'tag:yaml.org,2002:int' are not supported"),
        ("a: !!python/object/apply:os.system [ls]", "r:1:4: tags such as "),
        ("a: !x 1", "r:1:4: tags such as '!x' are not supported"),
        ("[" * 100_000, "r: is nested too deeply"),
        ("\n".join(f"{' ' * i}a{i}:" for i in range(2000)), "r: is nested too deeply"),
        ("- " * 5000, "r: is nested too deeply"),
        ("a: 1\n---\nb: 2", "r:2:1: is not YAML: but found another document"),
        ("a: " + "9" * 5000, "r:1:4: a: a number of 5,000 digits"),
        ("a: 'x", "r:1:6: is not YAML: "),
        ("\ta: 1", "r:1:1: has a tab; indent YAML with spaces"),
        ("a: \x00", "r:1: contains a character that YAML does not allow"),
        ("? [a]\n: b", "r:1:3: a key must be text"),
        ("<<: 3", "r:1:5: << must be followed by mappings"),
    ],
    ids=lambda value: value[:12],
)
def test_hostile_yaml_is_one_line_with_its_place(text, says):
    with pytest.raises(UserError) as caught:
        yaml_file.load(text, "r")
    message = str(caught.value)
    assert message.startswith(says) and message.isprintable() and len(message) < LONGEST


@pytest.mark.parametrize("parser", sorted({"SafeLoader", yaml_file._Parser.__name__}))
def test_yaml_that_is_fine(parser, monkeypatch):
    monkeypatch.setattr(yaml_file, "_Parser", getattr(yaml_file.yaml, parser))
    text = """
base: &base {a: 1, b: 3e-4}
one: {<<: *base, b: 2}
both: {<<: [*base, {c: x}], d: [*base]}
plain: [0x_, 1_000, 017, 2024-01-01, ~, on, .inf, "5", 1:30, -.5e3]
"""
    values, lines = yaml_file.load(text, "r")
    assert values["one"] == {"a": 1, "b": 2} and values["both"] == {"a": 1, "b": 3e-4, "c": "x", "d": [values["base"]]}
    assert values["plain"] == ["0x_", 1000, 15, "2024-01-01", None, True, math.inf, "5", 90, -500.0]
    assert lines["one.b"] == 3 and lines["one.a"] == 2 and lines["both.d[0].a"] == 2 and lines["plain[3]"] == 5
    assert yaml_file.load("# nothing\n", "r") == (None, {})


def test_text_that_is_no_text(tmp_path):
    file = tmp_path / "r"
    for content, says in [
        (b"a: \xff", "1: is not UTF-8 text"),
        (b"a: 1\nb: \xe9\xe9", "2: is not UTF-8 text"),
        (b"#" * (17 << 20), " has more than 16 MiB"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            yaml_file.read_text(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\n")
    assert yaml_file.load(yaml_file.read_text(file), "r")[0] == {"a": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "h has the key 'a' twice"),
        ("[" * 100_000 + "]" * 100_000, "h is nested too deeply"),
        ("[" * 100 + "]" * 100, "h is nested too deeply"),
        ("9" * 5000, "h holds Exceeds the limit"),
        ("{", "h is not JSON"),
        ("", "h is not JSON"),
        (None, "h must be JSON, got None"),
    ],
    ids=lambda value: str(value)[:9],
)
def test_hostile_json_is_one_line(text, says):
    with pytest.raises(ValueError) as caught:
        parse_json(text, "h")
    assert str(caught.value).startswith(says) and len(str(caught.value)) < LONGEST


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "model: tiny\noutput: x\nsampling:\n  history: 0",
            "4: sampling.history: QueryConfig: history must be positive",
        ),
        ("model:\n  preset: tiny\n  height: -32\noutput: x", "3: model.height: ModelConfig: height must be positive"),
        ("model:\n  preset: tiny\n  fps: .nan\noutput: x", "3: model.fps: ModelConfig: fps must be positive, got nan"),
        (
            "output: x\nmodel: {preset: tiny, encoders: []}",
            "2: model.encoders: ModelConfig: encoders must not be empty",
        ),
        (
            "output: x\nmodel:\n  preset: tiny\n  encoders:\n    - {}\n    - rate: [3, 2, 2]",
            "6: model.encoders[1].rate: must be powers of two of at most 128, got [3, 2, 2]",
        ),
        (
            "output: x\nmodel:\n  preset: tiny\n  dit:\n    dim: 50",
            "4: model.dit: DiTConfig: dim must be heads times an",
        ),
        ("output: x\nmodel: {preset: tiny, dit: {depth: 10000000}}", "2: model.dit.depth: DiTConfig: depth must be at"),
        ("model: tiny\noutput: x\nsteps: 3", "3: PretrainConfig: keys must be among"),
        (
            "model: tiny\noutput: x\noptimisation: {seed: " + "9" * 900 + "}",
            "3: optimisation.seed: TrainConfig: seed must",
        ),
        (
            "model: tiny\noutput: x\ndata:\n  seconds: .inf",
            "4: data.seconds: DataConfig: seconds must be positive, got",
        ),
        ("model: tiny\noutput: x\ndata:\n  block_seconds: 1e-300", "4: data.block_seconds: DataConfig: block_seconds "),
        ("model: tiny\noutput: x\noptimisation:\n  batch: 1e8", "4: optimisation.batch: must be of type int, got 1000"),
        ('model: tiny\noutput: "a\\0b"', "2: output: PretrainConfig: output must not contain a NUL character"),
        ("model: tiny\noutput: x\nvae: [[[[[[]]]]]]", "3: vae: must be of type str, got [[[...]]]"),
    ],
    ids=lambda value: value[-20:],
)
def test_a_recipe_names_line_and_key(tmp_path, text, says):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_pretrain(file)
    message = str(caught.value).removeprefix(f"{file}:")
    assert message.startswith(says) and message.isprintable() and len(message) < LONGEST
