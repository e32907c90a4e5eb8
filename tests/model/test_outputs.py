"""Outputs are checked before any work, never overwrite inputs, and keep the mode of files that they replace."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import stat
import typing

import numpy as np
import pytest
import torch
import typer
from film_helpers import make_video
from paths import GOLDEN

from vidmem_kernels import MemoryBank
from vidmem_model import cli, files
from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.model.config import PRESETS
from vidmem_model.model.file import files_of, save_model
from vidmem_model.model.lora import base_of
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.video.png import write_png
from vidmem_model.video.write import video_writer
from vidmem_model.weights import write_tensors

# Every option and argument that is a path. An output names the ending that it must have; None: it is a folder.
INPUTS = {
    "demo": {"video"},
    "compress": {"video"},
    "retrieve": {"memory"},
    "pretrain-vae": {"config"},
    "pretrain": {"config"},
    "finetune": {"config"},
    "export": {"run"},
    "evaluate retrieval": {"model", "table", "video"},
    "generate": {"storyboard", "model", "vae", "text", "start"},
    "storyboard": {"lm"},
    "plot": {"result"},
}
OUTPUTS = {
    "demo": {"output": None},
    "compress": {"output": ".safetensors"},
    "retrieve": {"output": ".png"},
    "export": {"output": ".safetensors"},
    "evaluate retrieval": {"json_": ".json", "plot": ".png", "markdown": ".md"},
    "generate": {"output": ".mp4", "report": ".json"},
    "storyboard": {"output": ".yaml"},
    "profile": {"output": None},
    "plot": {"output": ".png"},
}
FILES = [(command, name) for command, names in OUTPUTS.items() for name, ending in names.items() if ending]


def commands():
    """Every command of the program by its name."""

    def walk(command, name):
        if hasattr(command, "commands"):
            for key, inner in command.commands.items():
                yield from walk(inner, f"{name} {key}".strip())
        else:
            yield name, command

    return dict(walk(typer.main.get_command(cli.app), ""))


def paths(app=cli.app, prefix=""):
    """The parameters that are paths, of every command."""
    found = {}
    for info in app.registered_commands:
        name = f"{prefix}{info.name or info.callback.__name__.replace('_', '-')}"
        hints = typing.get_type_hints(info.callback)
        found[name] = {parameter for parameter, hint in hints.items() if "Path" in repr(hint)}
    for group in app.registered_groups:
        found |= paths(group.typer_instance, f"{prefix}{group.name} ")
    return found


def test_every_path_is_an_input_or_an_output():
    found = paths()
    assert found.keys() == commands().keys()
    told = {name: INPUTS.get(name, set()) | OUTPUTS.get(name, {}).keys() for name in found}
    assert found == told
    assert sum(map(len, found.values())) > 20


def test_no_help_text_loses_a_word(monkeypatch, capfd):
    """Rich takes words in brackets for markup."""
    monkeypatch.setenv("COLUMNS", "400")
    for name, command in commands().items():
        assert cli.main([*name.split(), "--help"]) == 0
        shown = capfd.readouterr().out.split()
        for parameter in command.params:
            if getattr(parameter, "hidden", False):  # a former name is in no help text
                continue
            words = (parameter.help or "").replace("\\[", "[").split()
            assert set(words) <= set(shown), f"{name} {parameter.name}"
    assert cli.main(["profile", "--help"]) == 0
    assert capfd.readouterr().out.count("[default: ") == 9


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """One of each file that commands read."""
    folder = tmp_path_factory.mktemp("given")
    torch.manual_seed(0)
    made = {"video": make_video(folder / "film.mkv", frames=48), "run": folder / "run", "lm": folder / "lm"}
    made["memory"] = folder / "memory.safetensors"
    small = ["--size", "source", "--fps", "source"]
    assert cli.main(["compress", str(made["video"]), "-o", str(made["memory"]), *small]) == 0
    for name in ("run", "lm"):
        made[name].mkdir()
    made["model"] = save_model(made["run"], MemoryModel(PRESETS["tiny"]))
    made["config"] = made["lm"] / "config.json"
    made["config"].write_text("{}")
    made["storyboard"] = folder / "board.yaml"
    made["storyboard"].write_text("seconds: 2\nshots:\n  - {at: 0, prompt: a fox}\n")
    return made


def arguments(given, command, outputs):
    """A call of a command, and the files that it reads."""
    board, video, model = given["storyboard"], given["video"], given["model"]
    call, read = {
        "compress": (["compress", video], [video]),
        "retrieve": (["retrieve", given["memory"], "--frame", 0], [given["memory"]]),
        "export": (["export", given["run"]], [model]),
        "storyboard": (["storyboard", "a fox", "--lm", given["lm"]], [given["config"]]),
        "generate": (["generate", board, "--model", model, "--start", video], [board, model, video]),
        "evaluate retrieval": (["evaluate", "retrieval", "--model", given["run"], "--video", video], [model, video]),
        "plot": (["plot", given["config"]], [given["config"]]),
    }[command]
    if command == "generate" and "output" not in outputs:
        outputs = {**outputs, "output": given["video"].with_name("new.mp4")}
    for name, path in outputs.items():
        call += [f"--{name.strip('_')}", path]
    return [str(part) for part in call], read


def device(folder, path):
    path.symlink_to(folder.draw.choice(["/dev/null", "/dev/zero", "/dev/full"]))
    return "is a device"


def pipe(folder, path):
    os.mkfifo(path)
    return "is a pipe"


def unix_socket(folder, path):
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(folder)  # a socket's name may have 108 bytes
        made.bind(path.name)
    return "is a socket"


def directory(folder, path):
    path.mkdir()
    return "is a directory"


def read_only(folder, path):
    path.write_text("mine")
    path.chmod(folder.draw.choice([0o444, 0o400, 0o555]))
    return "is read-only"


def loop(folder, path):
    path.symlink_to(path.name)
    return "links"


def broken(folder, path):
    path.symlink_to(folder / "none" / "file")
    return "broken link"


def standard_output(folder, path):
    path.symlink_to(folder.draw.choice(["/dev/stdout", "/dev/stderr", "/proc/self/fd/1", "/dev/fd/2"]))
    return "is stdout or stderr of this command"


def zero(folder, path):
    path.symlink_to("x" * 255 + "/" + "y" * 255 + "/z")
    return "broken link"


KINDS = (device, pipe, unix_socket, directory, read_only, loop, broken, standard_output, zero)


class Folder:
    """A folder with a generator of its own."""

    def __init__(self, path, seed):
        self.path, self.draw = path, random.Random(seed)

    def __truediv__(self, name):
        return self.path / name

    def __fspath__(self):
        return str(self.path)


def state(folder):
    """What is in a folder: names, kinds, contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = path.read_bytes() if stat.S_ISREG(mode) else os.readlink(path) if stat.S_ISLNK(mode) else None
        found[str(path.relative_to(folder))] = (mode, path.lstat().st_ino, content)
    return found


def refused(capfd, call, *words):
    assert cli.main(call) == 2, call
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1, err
    for word in words:
        assert word in err
    return err


@pytest.mark.sample(24)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("command", "name"), FILES)
def test_what_is_no_file_is_refused(given, tmp_path, monkeypatch, capfd, command, name, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"out{OUTPUTS[command][name]}"
    says = kind(Folder(tmp_path, f"{command} {name} {kind.__name__}"), path)
    before = state(tmp_path)
    call, _ = arguments(given, command, {name: path})
    refused(capfd, call, says, path.name)
    assert state(tmp_path) == before


def plain(folder, path, file):
    return file


def dotted(folder, path, file):
    return f"{file.parent}/./../{file.parent.name}/{file.name}"


def relative(folder, path, file):
    return os.path.relpath(file, folder)


def symbolic(folder, path, file):
    path.symlink_to(file)
    return path


def chained(folder, path, file):
    (folder / "between").symlink_to(os.path.relpath(file, folder))
    path.symlink_to("between")
    return path


def hard(folder, path, file):
    path.hardlink_to(file)
    return path


def linked_folder(folder, path, file):
    (folder / "elsewhere").symlink_to(file.parent)
    return folder / "elsewhere" / file.name


NAMES = (plain, dotted, relative, symbolic, chained, hard, linked_folder)


@pytest.mark.sample(24)
@pytest.mark.parametrize("by", NAMES, ids=lambda by: by.__name__)
@pytest.mark.parametrize(("command", "name"), FILES)
def test_an_input_is_refused_by_any_name(given, tmp_path, monkeypatch, capfd, command, name, by):
    monkeypatch.chdir(tmp_path)
    ending = OUTPUTS[command][name]
    _, read = arguments(given, command, {})
    before = {file: file.read_bytes() for file in read}
    for number, file in enumerate(read):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        given_as = str(by(folder, folder / f"out{ending}", file))
        if not given_as.endswith(ending) and ending in (".png", ".mp4") and name == "output":
            continue  # refused for its ending
        call, _ = arguments(given, command, {name: given_as})
        refused(capfd, call, "is the input", os.path.basename(given_as))
    assert {file: file.read_bytes() for file in read} == before


def test_two_outputs_are_two_files(given, tmp_path, capfd):
    (tmp_path / "here").symlink_to(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "hard.json").hardlink_to(tmp_path / "old.json")
    pairs = [
        ("new.json", "new.json"),
        ("new.json", "here/new.json"),
        ("new.json", "NEW.json"),
        ("old.json", "hard.json"),
    ]
    for first, second in pairs:
        both = {"json_": tmp_path / first, "markdown": tmp_path / second}
        refused(capfd, arguments(given, "evaluate retrieval", both)[0], "two outputs")
    both = {"output": tmp_path / "a.mp4", "report": tmp_path / "a.mp4.parts" / "report.json"}
    (tmp_path / "a.mp4.parts").mkdir()
    refused(capfd, arguments(given, "generate", both)[0], "contains another output")


def test_a_folder_takes_the_place_of_no_input(given, tmp_path, capfd):
    """Names that the demo and the profile write in their folders."""
    film = make_video(tmp_path / "report.mkv", frames=24)
    for name in ("report.json", "memory-dct.safetensors", "contact_sheet.png", "memory_vs_context.json"):
        for link in (os.symlink, os.link):
            link(film, tmp_path / name)
            before = film.read_bytes()
            refused(capfd, ["demo", str(film), "-o", str(tmp_path)], "is the input", name)
            assert film.read_bytes() == before
            os.unlink(tmp_path / name)
    os.mkfifo(tmp_path / "memory_vs_context.json")
    refused(capfd, ["profile", "-o", str(tmp_path), "--lengths", "1"], "is a pipe")
    for name in ("demo", "profile"):
        refused(capfd, [name, "-o", str(tmp_path / "memory_vs_context.json")], "is a device, pipe or socket")
        refused(capfd, [name, "-o", str(film)], "is a file; give the path of a folder")


def recipe(folder, output, video, **more):
    path = folder / "recipe.yaml"
    values = "".join(f"{key}: {value}\n" for key, value in more.items())
    path.write_text(f"{values}output: {output}\ndata: {{videos: ['{video}']}}\n")
    return path


def test_a_run_holds_none_of_its_inputs(given, tmp_path, capfd):
    films = tmp_path / "films"
    (films / "deep").mkdir(parents=True)
    film = make_video(films / "deep" / "film.mkv", frames=24)
    (tmp_path / "here").symlink_to(films)
    for output in (films, tmp_path / "here", films / "deep", films / "deep" / ".." / "deep"):
        for command in ("pretrain", "pretrain-vae"):
            call = [command, str(recipe(tmp_path, output, film, model="tiny" if command == "pretrain" else "demo"))]
            refused(capfd, call, "contains the training video")
    assert [path.name for path in films.rglob("*")] == ["deep", "film.mkv"]
    before = given["model"].read_bytes()
    for start in (given["run"], given["model"]):
        refused(capfd, ["finetune", str(recipe(tmp_path, given["run"], film, **{"from": start}))], "is the input")
    assert given["model"].read_bytes() == before and os.listdir(given["run"]) == ["model.safetensors"]
    for output, says in (
        ('"a\\0b"', "NUL character"),
        (f"{film}/x", "Not a directory"),
        ("x" * 300, "at most 255 bytes"),
    ):
        refused(capfd, ["pretrain", str(recipe(tmp_path, output, film, model="tiny"))], says)
    (tmp_path / "mine").mkdir()
    for output in ("mine", "new"):
        call = ["pretrain", str(recipe(tmp_path, tmp_path / output, tmp_path / "none.mkv", model="tiny"))]
        refused(capfd, call, "none.mkv")
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "new").exists()
    os.mkfifo(tmp_path / "pipe")
    refused(capfd, ["pretrain", str(recipe(tmp_path, tmp_path / "pipe", film, model="tiny"))], "is a device, pipe")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "curve.csv")
    refused(capfd, ["pretrain", str(recipe(tmp_path, tmp_path / "out", film, model="tiny"))], "curve.csv: is a pipe")


def save_video(path):
    with video_writer(path, 8) as write:
        write(np.zeros((2, 16, 16, 3), np.uint8))


def save_bank(path):
    bank = MemoryBank(4)
    bank.append(torch.ones(2, 4), torch.zeros(2, 3))
    bank.save(path)


WRITERS = {
    "json": lambda path: files.write_json(path, {"a": 1}),
    "png": lambda path: write_png(path, torch.zeros(4, 4, 3, dtype=torch.uint8)),
    "safetensors": lambda path: write_tensors(path, {"a": torch.ones(3), "b": torch.zeros(2)}, {"x": "1", "a": "2"}),
    "mp4": save_video,
    "bank": save_bank,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_mode_owner_links_and_bytes(tmp_path, kind):
    path = tmp_path / f"file.{kind}"
    before = os.umask(0o027)
    try:
        WRITERS[kind](path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    content = path.read_bytes()
    for mode in (0o600, 0o644, 0o666, 0o640, 0o604, 0o755):
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 1234, 4321)
        WRITERS[kind](path)
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == mode
        assert os.geteuid() or (found.st_uid, found.st_gid) == (1234, 4321)
        assert path.read_bytes() == content, "equal content gives equal bytes"
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / f"link.{kind}", tmp_path / "folder" / "target"
    link.symlink_to("folder/target")  # nothing is there yet
    for _ in range(2):
        WRITERS[kind](link)
        assert link.is_symlink() and target.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == sorted(["folder", path.name, link.name])
    assert os.listdir(tmp_path / "folder") == ["target"]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_writer_takes_the_place_of_what_is_no_file(tmp_path, monkeypatch, kind):
    for number, make in enumerate(KINDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        if make is standard_output and kind == "bank":
            continue  # the library does not know what its process prints
        path = folder / f"out.{kind}"
        make(Folder(folder, kind), path)
        before = state(folder)
        with pytest.raises((UserError, OSError)) as error:
            WRITERS[kind](path)
        assert "\n" not in str(error.value)
        assert state(folder) == before


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(4))
def test_reruns_replace_what_they_wrote(given, tmp_path, seed):
    """Valid outputs are not refused: the same call twice, into existing files and folders."""
    draw = random.Random(seed)
    out = tmp_path / draw.choice(["a b", "ä", "x.y"])
    out.mkdir()
    memory, image = out / "m.safetensors", out / "i.png"
    for _ in range(2):
        assert cli.main(["compress", str(given["video"]), "-o", str(memory), "--size", "32x48", "--fps", "source"]) == 0
        assert cli.main(["retrieve", str(memory), "--frame", "3", "-o", str(image)]) == 0
    assert sorted(os.listdir(out)) == ["i.png", "m.safetensors"]
    export = ["export", str(given["run"]), "-o", str(out / "new" / "model.safetensors"), "--dtype", "float32"]
    contents = set()
    for _ in range(2):
        assert cli.main(export) == 0
        contents.add((out / "new" / "model.safetensors").read_bytes())
    assert len(contents) == 1


def test_all_pairs_of_paths_are_told_apart(tmp_path):
    """`outputs` itself: an output and an input are refused exactly where they are one file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "there").symlink_to("folder")
    for name in ("a", "b"):
        (tmp_path / "folder" / name).write_text(name)
    (tmp_path / "hard").hardlink_to(tmp_path / "folder" / "a")
    (tmp_path / "soft").symlink_to("folder/b")
    names = {"a": ["folder/a", "there/a", "hard", "folder/../there/./a"], "b": ["folder/b", "there/b", "soft"]}
    names["new"] = ["new", "there/../new", "./new"]
    every = [(file, tmp_path / name) for file, given_as in names.items() for name in given_as]
    for (mine, output), (theirs, read) in itertools.product(every, every):
        for keywords in ({"inputs": [read], "files": [output]}, {"files": [read, output]}):
            if mine == theirs:
                with pytest.raises(UserError):
                    files.outputs(**keywords)
            else:
                files.outputs(**keywords)


def test_files_of_a_model(tmp_path):
    """Adapters bring the model that they are added to; files that name each other are refused."""
    golden = GOLDEN / "models"
    names = ["tiny_continue.safetensors", "tiny.safetensors", "vae.safetensors"]
    assert files_of(golden / names[0]) == [golden / name for name in names]
    for name, base in (("a", "b"), ("b", "a"), ("self", "self")):
        form = {"rank": 1, "alpha": 1.0, "base": f"{base}.safetensors"}
        header = {"format": "vidmem.lora", "version": "1", "lora": json.dumps(form), "extra": "{}"}
        write_tensors(tmp_path / f"{name}.safetensors", {"x": torch.zeros(1)}, header)
    for name in ("a", "b", "self"):
        path = tmp_path / f"{name}.safetensors"
        assert base_of(path) is not None
        with pytest.raises(MemoryFormatError, match="names itself as its base model"):
            files_of(path)
