"""What C++ refuses is said in one form: "<op>: <what must hold>, got <what came>"."""

from __future__ import annotations

import re

import pytest
from paths import ROOT

CSRC = ROOT / "csrc"
SOURCES = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cpp", ".cu", ".cuh")]


def calls(text, name):
    """Arguments of every call of `name`, as written."""
    for match in re.finditer(rf"\b{name}(<[\w:]+>)?\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield text[match.end() : end - 1]


def messages(text):
    for name in ("VIDMEM_CHECK", "fail"):
        for arguments in calls(text, name):
            pieces = re.findall(r'"((?:[^"\\]|\\.)*)"', arguments)
            if pieces:  # else it is the definition
                yield "".join(pieces)


def test_every_message_says_what_must_hold_and_what_came():
    found = [(path, message) for path in SOURCES for message in messages(path.read_text())]
    assert len(found) > 50
    wrong = [
        f"{path.relative_to(CSRC)}: {message}"
        for path, message in found
        if not re.search(r"\b(must|cannot|requires|is required|offer|lacks)\b.*, got( |$)", message)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_is_thrown_past_the_one_form():
    """All but what torch and CUDA report, which are no mistakes of the caller."""
    thrown = [
        path.relative_to(CSRC).as_posix()
        for path in SOURCES
        for kind in re.findall(r"throw std::(\w+)", path.read_text())
        if kind != "runtime_error"
    ]
    assert thrown == []


@pytest.mark.parametrize("text", ['VIDMEM_CHECK(f(x) > 0, op, "x must be positive");', 'fail(op, "no dtype of ours");'])
def test_a_message_in_another_form_is_found(text):
    (message,) = messages(text)
    assert ", got" not in message
