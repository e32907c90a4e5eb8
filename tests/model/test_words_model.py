"""The words that users of the model read: the help of every command and option, the form of public docstrings."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

pytest.importorskip("av")

import typer.main
from docstring_helpers import faults, members

import vidmem_model
from vidmem_model.checks import Checked
from vidmem_model.cli import main
from vidmem_model.cli.app import app
from vidmem_model.generation.generator import Progress
from vidmem_model.generation.storyboard import Shot, Storyboard
from vidmem_model.memory.compressor import CompressedMemory
from vidmem_model.memory.file import Memory
from vidmem_model.model.encoder import MemoryTokens
from vidmem_model.video import Clip, VideoInfo

# Options that have no default: without them something is not read, not written or not done.
OPTIONAL = {"backend", "base", "model", "table", "json_", "plot", "markdown", "text", "start", "report", "video"}


def commands(command, path=()):
    """(words of the command line, command) of a command and of all below it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def shown_default(parameter):
    """The default as help must show it; "" where there is none, None where one is missing."""
    if isinstance(parameter.show_default, str):
        return f"[default: ({parameter.show_default})]"
    if parameter.required:
        return "[required]"
    if getattr(parameter, "is_flag", False) and not parameter.default:
        return ""
    if parameter.default is None:
        return "" if parameter.name in OPTIONAL else None
    return f"[default: {parameter.default}]"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(("vidmem", *path)))
def test_help(path, capfd, monkeypatch):
    """Each option is a sentence, and what is shown of it is what was written, the default included."""
    monkeypatch.setenv("COLUMNS", "400")
    assert main([*path, "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())
    text = " ".join(COMMANDS[path].help.split())
    assert text in shown and text[0].isupper() and text.endswith("."), text
    for parameter in COMMANDS[path].params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        said, default = parameter.help, shown_default(parameter)
        assert said and said[0].isupper() and said.endswith("."), (parameter.name, said)
        assert default is not None, (parameter.name, "shows no default")
        assert f"{said} {default}".strip() in shown.replace(" [env var: VIDMEM_BACKEND]", ""), parameter.name


def configurations():
    """Every class of fields that a recipe, a file or a caller gives."""
    for module in pkgutil.walk_packages(vidmem_model.__path__, "vidmem_model."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    return {kind.__name__: kind for kind in Checked.__subclasses__() if kind.__module__.startswith("vidmem_model.")}


CONFIGURATIONS = configurations()
RESULTS = (Clip, CompressedMemory, Memory, MemoryTokens, Progress, Shot, Storyboard, VideoInfo)
EXPORTS = {name: getattr(vidmem_model, name) for name in vidmem_model.__all__ if name not in CONFIGURATIONS}
OBJECTS = {name: (value, owner) for name, value, owner in members(EXPORTS | {kind.__name__: kind for kind in RESULTS})}
OBJECTS |= {name: (kind, None) for name, kind in CONFIGURATIONS.items()}


@pytest.mark.parametrize("name", OBJECTS)
def test_public_docstring(name):
    assert not list(faults(*OBJECTS[name], fields="Args" if name in CONFIGURATIONS else "Attributes"))


def test_nothing_is_left_out():
    assert len(COMMANDS) >= 12 and len(CONFIGURATIONS) >= 20 and len(OBJECTS) >= 45
