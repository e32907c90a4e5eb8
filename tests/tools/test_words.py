"""The words that users read: the form of public docstrings and of error messages."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec

import pytest
import torch
from docstring_helpers import faults, members
from paths import ROOT

import vidmem_kernels
import vidmem_kernels.diffusers
from vidmem_kernels.testing import public_functions

PACKAGE = ROOT / "vidmem_kernels"


def public():
    """The public objects by name."""
    found = {name: getattr(vidmem_kernels, name) for name in vidmem_kernels.__all__}
    if find_spec("diffusers"):
        for name in vidmem_kernels.diffusers.__all__:
            found[f"diffusers.{name}"] = getattr(vidmem_kernels.diffusers, name)
    return found


OBJECTS = {name: (value, owner) for name, value, owner in members(public())}
OP = ("Equivalent PyTorch",)


@pytest.mark.parametrize("name", OBJECTS)
def test_public_docstring(name):
    assert not list(faults(*OBJECTS[name], required=OP if name in public_functions() else ()))


def one(x: int, **more: int) -> torch.Tensor:
    """Does something, at length

    Args:
        y: another.
    """


def test_faults_are_found():
    assert len(OBJECTS) > 60
    assert [fault.split(",")[0] for fault in faults(one, None, required=OP)] == [
        "the first line must be one sentence that ends in a period",
        "Args must be ['x'",
        "a section Returns must say what torch.Tensor is",
        "a section Equivalent PyTorch must be there",
    ]


# --- error messages ---

ERRORS = {"ValueError", "TypeError", "RuntimeError", "IndexError", "BackendError", "MemoryFileError"}
# "<op>: <what must hold>, got <what came>", or "<op>: <what is wrong>; <what to do>"; {} is what is filled in.
FORM = re.compile(r"^[^:]*[\w}]: (.*\b(must|cannot|requires|required)\b.*, got |.*; [\w{])", re.DOTALL)
# Messages in another form, by a part of each, and why.
OTHER_FORMS = {
    "{}: {}, got {} and {}": "check_same: its callers say what must hold, see test_conditions",
    "{} must be one of {}, got {}{}": "check_backend: its callers name the op",
    "VIDMEM_CPU_CAPABILITY: {}": "the message of C++, which has the form",
    "cannot be read under vmap": "nothing that came could be shown, nor is there anything else to do",
    "{}, or, if it was rewritten by another program": "the message of memory_file.foreign with one more remedy",
}


def written(node):
    """A string as written, "{}" for what is filled in; None if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (written(node.left) or "{}") + (written(node.right) or "{}")
    return None


def strings(functions, place):
    """(file:line, string) of the argument at `place` of every call of the functions in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in functions:
                continue
            if len(node.args) > place and (text := written(node.args[place])) is not None:
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", text


def test_error_messages_have_one_form():
    found = list(strings(ERRORS, 0))
    assert len(found) > 120
    wrong = [f"{where}: {m}" for where, m in found if not FORM.search(m) and not any(part in m for part in OTHER_FORMS)]
    assert not wrong, "\n".join(wrong)
    unused = [part for part in OTHER_FORMS if not any(part in message for _, message in found)]
    assert not unused


def test_conditions():
    """What `check_same` is given is the condition alone."""
    found = list(strings({"check_same"}, 1))
    assert len(found) > 40
    assert [text for text in found if " must " not in text[1]] == []


@pytest.mark.parametrize(
    "message", ["{}: x is wrong", "x must be 3, got {}", "op: x should be 3, got {}", "op: give 3"]
)
def test_a_message_in_another_form_is_found(message):
    assert not FORM.search(message)
