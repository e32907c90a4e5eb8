"""Checks that commands in the documentation use existing options."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from install_helpers import declared
from paths import ROOT

QUICK = ("compress", "retrieve", "info", "recipes")  # of vidmem: run with the clip film.mp4
_PROGRAMS = ("vidmem", "python", "python3", "make", "pip", "pytest", "torchrun")
_FILMS = {"VIDEO", "FILM.mp4", "video.mp4", "clip.mp4"}  # names that stand for the reader's film
_DISTRIBUTIONS = {"vidmem-kernels": "vidmem_kernels", ".": "vidmem_kernels"}
_DISTRIBUTIONS |= {"vidmem-model": "vidmem_model", "./python": "vidmem_model"}
_MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command of ours in a block of shell, or in a piece of inline code."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        line = re.sub(r"^\s*\$ ", "", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe, or what a program printed
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        if words:
            words[0] = words[0].removeprefix(".venv/bin/")
        script = bool(words) and re.fullmatch(r"[\w./-]+\.(sh|py)", words[0])
        if words and (words[0] in _PROGRAMS or script) and len(words) > 1:
            end = next((i for i, word in enumerate(words) if word in ("|", ">", ">>", "&&", ";", "2>&1", "&")), None)
            found.append([word for word in words[:end] if not re.fullmatch(r"\[.*\]|\.\.\.|…", word)])
    return found


def wrong(words: list[str]) -> str | None:
    """What a command names that is not there."""
    program, *rest = words
    if program == "vidmem":
        return _wrong_vidmem(rest)
    if program == "make":
        return _wrong_make(rest)
    if program == "pip":
        return _wrong_pip(rest)
    if program in ("pytest", "torchrun"):
        return _wrong_paths(rest)
    if program not in ("python", "python3"):
        return _wrong_script(program, rest)
    if rest[0] == "-m":
        if rest[1] == "pytest":
            return _wrong_paths(rest[2:])
        return None if find_spec(rest[1]) or rest[1] in ("venv", "pip") else f"no module {rest[1]}"
    return None if rest[0] in ("-c", "setup.py") else _wrong_script(rest[0], rest[1:])


def _wrong_vidmem(words: list[str]) -> str | None:
    import typer

    import vidmem_model.cli as cli

    command = typer.main.get_command(cli.app)
    context = command.context_class(command, info_name="vidmem")
    while hasattr(command, "commands"):
        while words and words[0].startswith("-"):  # an option of the group, with its value
            flags = {name for option in command.params for name in option.opts if getattr(option, "is_flag", False)}
            if words[0] in ("-h", "--help"):
                return None
            if words[0] not in {name for option in command.params for name in option.opts}:
                return f"no option {words[0]}"
            words = words[1 if words[0] in flags else 2 :]
        if not words or words[0] == "COMMAND":
            return None
        if words[0] not in command.commands:
            return f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
        context = command.context_class(command, info_name=command.name, parent=context)
    try:
        values, _, _ = command.make_parser(context).parse_args(list(words))
        for option in command.params:
            if option.param_type_name == "option" and (value := values.get(option.name)) not in (None, ()):
                option.process_value(context, value)
    except Exception as error:  # the parser's own kinds of error depend on the version of typer
        return getattr(error, "message", "") or f"{type(error).__name__}: {error}"
    return None


def _wrong_make(words: list[str]) -> str | None:
    for word in words:
        name, is_variable, _ = word.partition("=")
        line = f"{name} ?=" if is_variable else f"{name.replace('.venv/', '$(VENV)/')}:"
        if not re.search(f"^{re.escape(line)}", _MAKEFILE, re.MULTILINE):
            return f"no {'variable' if is_variable else 'target'} {name}"
    return None


def _wrong_pip(words: list[str]) -> str | None:
    for word in words:
        match = re.match(r"(vidmem-\w+|\./python|\.)\[([\w,]+)\]", word)
        if match:
            extras = declared(_DISTRIBUTIONS[match[1]])["optional-dependencies"]
            if lost := set(match[2].split(",")) - extras.keys():
                return f"no extra {', '.join(lost)}"
    return None


def _wrong_paths(words: list[str]) -> str | None:
    paths = [word.split("::")[0] for word in words if "/" in word and "{" not in word and not word.startswith("-")]
    lost = [path for path in paths if path.startswith(("tests/", "benchmarks/")) and not (ROOT / path).exists()]
    return f"no {', '.join(lost)}" if lost else None


def _wrong_script(path: str, words: list[str]) -> str | None:
    script = next((folder / path for folder in (ROOT, ROOT / "benchmarks") if (folder / path).exists()), None)
    if script is None:
        return f"no script {path}"
    text = script.read_text(encoding="utf-8")
    if "parse_known_args" in text:  # what it does not know it passes on
        return None
    if "add_argument" not in text:  # a wrapper of the programs beside it
        text = "".join(file.read_text(encoding="utf-8") for file in script.parent.rglob("*.py"))
    options = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    lost = sorted(name for name in options - {"-h", "--help"} if f'"{name}"' not in text)
    return f"no option {', '.join(lost)} in {path}" if lost else None


def run_vidmem(words: list[str]) -> None:
    """Runs a command of vidmem here, on film.mp4 for the reader's film, and at the size of that."""
    from film_helpers import SMALL

    from vidmem_model.cli import main

    words = ["film.mp4" if word in _FILMS and not Path(word).exists() else word for word in words]
    if words[0] == "compress" and "learned" not in words:  # of two values of an option the last one holds
        words = [*words, *SMALL]
    code = main(words)
    assert code == 0, f"vidmem {shlex.join(words)} ended with {code}"
