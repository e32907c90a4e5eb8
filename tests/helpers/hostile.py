"""Hostile files: valid ones of every format, changed field by field.

`draw(format, seed)` gives a case: files for a folder, and the command line that reads them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import random
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hostile_worker import GOLDEN, Case, Worker, link_golden
from paths import ROOT


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Let Python write numbers of any length and lists of any depth."""
    digits, depth = sys.get_int_max_str_digits(), sys.getrecursionlimit()
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(50_000)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(digits)
        sys.setrecursionlimit(depth)


_NUMBERS = [-1, 0, -32, 1, 2, 3, 7, 100, 1000, 2**15, 2**31 - 1, 2**31, 2**63, 2**64, 10**9, 10**18, 10**400, 10**5000]
_FLOATS = [0.5, -0.0, 1e-300, 1e-9, 1e9, 1e308, math.nan, math.inf, -math.inf]
_WORDS = "x ../../x /etc/passwd ~nosuchuser/x . nan 1 1e5 0x10 2024-01-01 dct causal wan transformers merge sample 片"
_TEXTS = ["", "x" * 10_000, "a\0b", "\x1b[31m", "\u202e", "[" * 2000, *_WORDS.split()]
SCALARS: list[Any] = [None, True, False, *_NUMBERS, -(10**5000), *_FLOATS, *_TEXTS]


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def hostile_value(rng: random.Random) -> Any:
    """Any value that a file may hold where another belongs."""
    kind = rng.randrange(10)
    if kind < 7:
        return rng.choice(SCALARS)
    lists = [[], {}, [[]], [1] * 10_000, [{}] * 3000, {"a": 1}, {"preset": "tiny"}, nested(40), nested(900), [0, 0, 0]]
    return rng.choice(lists) if kind < 9 else [rng.choice(SCALARS) for _ in range(rng.randrange(1, 5))]


def near(value: Any, rng: random.Random) -> Any:
    """A value of the same type, or about the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice(
            [-value, value + 1, value - 1, value * 2, value * 10**6, value // 3, -(2**15), value % 7 + 0.5, str(value)]
        )
    if isinstance(value, str):
        return rng.choice([value + "t", value[:-1], value.upper(), value * 1000, [value]])
    if isinstance(value, list):
        return rng.choice([value[:-1], value + value[:1], value * 1000, value[::-1], [value], list(map(str, value))])
    return hostile_value(rng)


def places(tree: Any, before: tuple = ()) -> list[tuple]:
    """Paths of everything inside a tree of dicts and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for key, value in entries:
        found.append((*before, key))
        found += places(value, (*before, key))
    return found


def mutate(tree: Any, rng: random.Random, keep: tuple[str, ...] = ()) -> Any:
    """Change one thing in a tree, or two; what a key in `keep` has stays, but for what is inside of it."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = [place for place in places(tree) if place[-1] not in keep]
        if not found:
            return hostile_value(rng)
        *way, key = rng.choice(found)
        parent = tree
        for step in way:
            parent = parent[step]
        kind = rng.randrange(12)
        if kind < 6:
            parent[key] = hostile_value(rng)
        elif kind < 9:
            parent[key] = near(parent[key], rng)
        elif kind == 9:
            del parent[key]
        elif kind == 10 and isinstance(parent, dict):
            parent[rng.choice([f"{key}x", "", "__class__", "x" * 5000, key.upper()])] = parent.pop(key)
        elif isinstance(parent, dict):
            parent[rng.choice(["extra", "start", "preset", "base", "<<"])] = hostile_value(rng)
        else:
            parent.append(hostile_value(rng))
    return tree


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled, moved, zeroed or joined bytes."""
    if not content:
        return b"\0"
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0:
        return content[:a]
    if kind == 1:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:
        return content[:a] + content[a:b] * 2 + content[b:]
    if kind == 3:
        return content[:a] + bytes(b - a) + content[b:]
    if kind == 4:
        return content[:a] + content[b:]
    if kind == 5:
        return content[:a] + rng.randbytes(rng.randrange(1, 64)) + content[a:]
    return content + content[:a]


# --- YAML ---

SNIPPETS = """&a [*a]
*nothing
!!int abc
!!python/object/apply:os.system [ls]
!!binary aGk=
---
...
%YAML 9.9
? [a, b]
<<: *x
<<: {output: y}
2024-01-01T00:00:00Z
1:1:1:1:1.5""".splitlines()
_SIGNS = "' \" { | > @ ` 0x_ .nan .inf ! &a null ~"
SNIPPETS += [
    *_SIGNS.split(),
    "\t",
    "\x00",
    "\x07",
    "\ufeff",
    "\u2028",
    "[" * 2000,
    "- " * 500,
    "9" * 5000,
    "1" * 300 + ".5",
]
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else 'x'] * 9)}]\n" for i in range(11))


def hostile_yaml(tree: Any, rng: random.Random, keep: tuple[str, ...] = ()) -> bytes:
    """The YAML of a tree after a change of the tree or of the text."""
    import yaml

    kind = rng.randrange(10)
    text = yaml.safe_dump(mutate(tree, rng, keep) if kind < 7 else tree, sort_keys=False, allow_unicode=True)
    if kind == 7:
        lines = text.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        changed = rng.choice(
            [
                [*lines[:at], lines[at], *lines[at:]],  # a line, and so a key, twice
                [*lines[:at], rng.choice(SNIPPETS) + "\n", *lines[at:]],
                [*lines[:at], lines[at].rstrip("\n") + " " + rng.choice(SNIPPETS) + "\n", *lines[at + 1 :]],
                [*lines[:at], lines[at].partition(":")[0] + ": " + rng.choice(SNIPPETS) + "\n", *lines[at + 1 :]],
                [BOMB, *lines],
                [f"a: &x {'{'}b: {'[' * 20}{']' * 20}{'}'}\n" * 2, *lines],
            ]
        )
        return "".join(changed).encode("utf-8", "surrogatepass")
    if kind == 8:
        return damaged(text.encode(), rng)
    if kind == 9:
        plain = text.encode()
        whole = [
            b"",
            b"# nothing\n",
            b"x",
            b"[" * 100_000,
            b"#" * (17 << 20),
            b"\n".join(b" " * i + b"a:" for i in range(1000)),
        ]
        whole += [b"- " + plain, b"\xef\xbb\xbf" + plain, plain + b"---\n" + plain, plain.replace(b"e", b"\xe9", 1)]
        return rng.choice([*whole, b"\xff\xfe" + text.encode("utf-16-le")])
    return text.encode("utf-8", "surrogatepass")


# --- safetensors ---

SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclasses.dataclass
class Tensors:
    """A safetensors file taken apart: texts of the header, and dtype, shape and bytes of each tensor."""

    texts: dict[str, Any]
    tensors: dict[str, tuple[str, list[int], bytes]]

    @classmethod
    def read(cls, content: bytes) -> Tensors:
        """Take a file apart."""
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        texts = header.pop("__metadata__", {})
        data = content[8 + length :]
        parts = {n: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for n, e in header.items()}
        return cls(texts, parts)

    def header(self) -> dict[str, Any]:
        """The header, in the order in which the checksum of a memory file comes first."""
        made: dict[str, Any] = {"__metadata__": self.texts}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            made[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return made

    def write(self, header: Any = None, text: str | None = None) -> bytes:
        """Put it together, with another header or its text if given, and with the checksum that then belongs to it."""
        header = self.header() if header is None else header
        marked = isinstance(header, dict) and isinstance(header.get("__metadata__"), dict)
        marked = marked and "vidmem.checksum" in header["__metadata__"]
        if marked:
            header["__metadata__"]["vidmem.checksum"] = "0" * 64
        text = json.dumps(header, separators=(",", ":")) if text is None else text
        encoded = text.encode("utf-8", "surrogatepass")
        encoded += b" " * (-(8 + len(encoded)) % 64)
        content = len(encoded).to_bytes(8, "little") + encoded + b"".join(data for *_, data in self.tensors.values())
        if marked:
            content = content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)
        return content


def hostile_tensor(dtype: str, shape: list[int], data: bytes, rng: random.Random) -> tuple[str, list[int], bytes]:
    """A tensor of other numbers, dtype or shape, whose bytes fit these."""
    kind, size = rng.randrange(7), SIZES[dtype]
    count = len(data) // size
    bad = {"F64": "d", "F32": "f", "F16": "e"}
    if kind < 2 and dtype in bad and count:
        numbers = [math.nan, math.inf, -math.inf, -1.0, 0.0] + ([1e30] if dtype != "F16" else [6e4])
        value, at = struct.pack("<" + bad[dtype], rng.choice(numbers)), size * rng.randrange(count)
        return dtype, shape, value * count if kind else data[:at] + value + data[at + size :]
    if kind == 2:
        return dtype, shape, rng.choice([b"\xff", b"\x00", b"\x7f", b"\x80"]) * len(data)
    if kind == 3:
        return dtype, shape, rng.randbytes(len(data))
    if kind == 4:
        other = rng.choice(sorted(SIZES))
        return other, shape, (data * SIZES[other])[: count * SIZES[other]]
    if kind == 5:
        shape = rng.choice([[count], [1, *shape], [*shape, 1], shape[::-1], shape[1:] or [1], [0, *shape[1:]]])
        return dtype, shape, (data * 2)[: math.prod(shape) * size]
    rows = max(0, shape[0] + rng.choice([-1, 1, 100])) if shape else 1
    return dtype, [rows, *shape[1:]], (data * 200)[: math.prod([rows, *shape[1:]]) * size]


def hostile_tensors(content: bytes, rng: random.Random, inside: tuple[str, ...]) -> bytes:
    """A safetensors file with one thing changed; `inside` are the texts that hold JSON."""
    file, kind = Tensors.read(content), rng.randrange(16)
    texts = [name for name in file.texts if not name.startswith("vidmem.")]
    if kind < 5 and texts:  # what a text says
        name = rng.choice([*(name for name in inside if name in texts), *texts])
        if name in inside and rng.random() < 0.85:
            file.texts[name] = json.dumps(mutate([json.loads(file.texts[name])], rng)[:1]).strip()[1:-1]
        else:
            value = rng.choice([None, hostile_value(rng), near(file.texts[name], rng)])
            file.texts[name] = value if isinstance(value, str) or rng.random() < 0.2 else json.dumps(value)
            if value is None:
                del file.texts[name]
        return file.write()
    if kind < 10 and file.tensors:  # a tensor
        name = rng.choice(sorted(file.tensors))
        what = rng.randrange(8)
        if what < 5:
            file.tensors[name] = hostile_tensor(*file.tensors[name], rng)
        elif what == 5:
            del file.tensors[name]
        elif what == 6:
            file.tensors[rng.choice([name + "x", "", "x" * 5000, "a\nb", name + ".row_scale"])] = file.tensors.pop(name)
        else:
            file.tensors[name + rng.choice(["2", ".row_scale"])] = file.tensors[name]
        return file.write()
    if kind < 12:  # what the header says of the tensors
        return file.write(mutate(file.header(), rng))
    if kind == 12:  # a key twice
        text = json.dumps(file.header())
        key = rng.choice(sorted(file.header()))
        twice = f"{{{json.dumps(key)}: {json.dumps(rng.choice([file.header()[key], hostile_value(rng)]))}, {text[1:]}"
        return file.write(text=twice)
    if kind == 13:
        return file.write(
            text=rng.choice(["[" * 50_000, '{"a":' * 50_000, "", "{}", "[]", "null", '{"__metadata__":3}'])
        )
    if kind == 14:
        length = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(content), len(content) - 8, 100_000_001])
        return length.to_bytes(8, "little") + content[8:]
    return damaged(content, rng)


# --- formats ---


TINY = ["--seconds", "0.4", "--steps", "1", "--segment", "2", "--device", "cpu"]
BOARD = {
    "title": "a",
    "seconds": 2,
    "style": "ink",
    "shots": [{"at": 0, "prompt": "a fox"}, {"at": "0:01", "prompt": "x"}],
}


def recipe(name: str) -> dict[str, Any]:
    """A recipe of the golden runs, of one step."""
    import yaml

    values = yaml.safe_load((GOLDEN / "training" / f"{name}.yaml").read_text())
    values["optimisation"] |= {"steps": 1, "lr": 1e-3, "muon_lr": 0.0}
    values["output"] = "new"
    return values


def memory_case(rng: random.Random) -> Case:
    content = rng.choice(sorted((GOLDEN / "memories").iterdir())).read_bytes()
    hostile = hostile_tensors(content, rng, ("size", "grid", "box", "fps", "codec_channels"))
    return Case({"m": hostile}, ["retrieve", "m", "--frame", str(rng.choice((0, 6, 11))), "-o", "out.png"])


def model_case(rng: random.Random) -> Case:
    name = rng.choice(("models/tiny", "models/small", "training/finished/one"))
    hostile = hostile_tensors((GOLDEN / f"{name}.safetensors").read_bytes(), rng, ("config", "extra"))
    files = {"m/model.safetensors": hostile}
    if name.endswith("one"):
        files["m/vae.safetensors"] = (GOLDEN / "training" / "finished" / "vae.safetensors").read_bytes()
        if rng.random() < 0.3:
            board = json.dumps(BOARD).encode()
            return Case(files | {"b": board}, ["generate", "b", "-o", "out.mp4", "--model", "m", *TINY])
    return Case(files, ["export", "m", "-o", "out/x.safetensors", "--dtype", rng.choice(("int8", "float32"))])


def vae_case(rng: random.Random) -> Case:
    folder = GOLDEN / "training" / "finished"
    hostile = hostile_tensors((folder / "vae.safetensors").read_bytes(), rng, ())
    files = {"m/model.safetensors": (folder / "one.safetensors").read_bytes(), "m/vae.safetensors": hostile}
    return Case(files, ["export", "m", "-o", "out/x.safetensors"])


def adapter_case(rng: random.Random) -> Case:
    models = GOLDEN / "models"
    hostile = hostile_tensors((models / "tiny_continue.safetensors").read_bytes(), rng, ("lora", "extra"))
    files = {"tiny_continue.safetensors": hostile, "tiny.safetensors": (models / "tiny.safetensors").read_bytes()}
    if rng.random() < 0.1:  # a loop, through a second file
        file = Tensors.read((models / "tiny_continue.safetensors").read_bytes())
        for name, base in (
            ("tiny.safetensors", "tiny_continue.safetensors"),
            ("tiny_continue.safetensors", "tiny.safetensors"),
        ):
            file.texts["lora"] = json.dumps(json.loads(file.texts["lora"]) | {"base": base})
            files[name] = file.write()
    return Case(files, ["export", "tiny_continue.safetensors", "-o", "out.safetensors"])


def recipe_case(rng: random.Random) -> Case:
    name, command = rng.choice((("one", "pretrain"), ("one", "pretrain"), ("two", "finetune"), ("vae", "pretrain-vae")))
    return Case({"r.yaml": hostile_yaml(recipe(name), rng, keep=("steps", "optimisation"))}, [command, "r.yaml"])


def captions_case(rng: random.Random) -> Case:
    import yaml

    rows = [{"start": 0, "end": 3, "prompt": "a red disc"}, {"start": 3, "end": 6, "prompt": "a blue disc"}]
    files = {"captions.yaml": hostile_yaml(rows, rng), "r.yaml": yaml.safe_dump(recipe("one")).encode()}
    return Case(files, ["pretrain", "r.yaml"])


def storyboard_case(rng: random.Random) -> Case:
    models = "finished/one.safetensors"
    return Case({"b": hostile_yaml(BOARD, rng)}, ["generate", "b", "-o", "out.mp4", "--model", models, *TINY])


def film_case(rng: random.Random) -> Case:
    film = damaged((GOLDEN / "training" / "film.mkv").read_bytes(), rng)
    raw = ["--size", "source", "--fps", "source", "--rate", "1x1x2", "--channels", "64"]
    method = rng.choice((["-m", "dct", *raw], ["-m", "merge", *raw[:6]], ["-m", "dct", "--size", "32x48"]))
    return Case({"f.mkv": film}, ["compress", "f.mkv", "-o", "out", *method])


def hostile_csv(content: bytes, rng: random.Random) -> bytes:
    """A CSV file with a changed row or field."""
    rows = mutate([line.split(",") for line in content.decode().splitlines()], rng)
    rows = rows if isinstance(rows, list) else [rows]
    lines = (",".join(map(str, row if isinstance(row, list) else [row])) for row in rows)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def result_case(rng: random.Random) -> Case:
    """A result file that is drawn again."""
    path, *options = rng.choice(RESULTS).split()
    content = (ROOT / path).read_bytes()
    if rng.random() < 0.15:
        changed = damaged(content, rng)
    elif path.endswith(".csv"):
        changed = hostile_csv(content, rng)
    else:
        changed = json.dumps(mutate(json.loads(content), rng, keep=("format",))).encode()
    name = Path(path).name
    return Case({name: changed}, ["plot", name, "-o", f"plot.{rng.choice(('png', 'pdf', 'svg'))}", *options])


def run_case(rng: random.Random) -> Case:
    """What a stopped run left: settings, curve, checkpoint; and the cache of its latents."""
    files = dict(prepared_run())
    name = rng.choice(sorted(files))
    content = files[name]
    if name.endswith((".json",)) and rng.random() < 0.7:
        files[name] = json.dumps(mutate(json.loads(content), rng)).encode()
    elif name.endswith(".safetensors"):
        files[name] = hostile_tensors(content, rng, ("block",))
    elif name.endswith(".csv") and rng.random() < 0.7:
        files[name] = hostile_csv(content, rng)
    else:
        files[name] = damaged(content, rng)
    return Case(files, ["pretrain", "one.yaml"])


_NUMBER_WORDS = "nan inf -inf -1 0 1e308 1e-308 10**9 1.5 0x10 ٣ -0"
NUMBERS = [*_NUMBER_WORDS.split(), "", "9" * 20, "9" * 5000, "x" * 2000]
_SHAPE_WORDS = "1x1000000000 0x0x0 -1x-1 axb 1x nanx1 4x4x2x1 source 1,2x , 1,,2 1e9"
SHAPES = [*_SHAPE_WORDS.split(), "9" * 50 + "x1"]
NAMES = ["learnt", "int4", "DCT", "cuda:99", "cuda:٣", "cuda:" + "9" * 5000, "../x", "/etc/passwd"]
MODEL = "finished/one.safetensors"
# Files that `vidmem plot` draws, and an option.
RESULTS = [
    "docs/memory_vs_context.json",
    "docs/cost.json --columns=1",
    "docs/cost.json",
    "docs/retrieval.json",
    "docs/retrieval.json --positions",
    "python/vidmem_model/pretrained/demo_continue.curve.csv",
]
# Commands, and the options of each that are given hostile values.
OPTIONS = {
    "compress film.mkv -o out": "seconds start fps size rate budget channels dtype method",
    "retrieve m -o out.png --frame 0": "frame steps",
    f"generate b -o x.mp4 --model {MODEL} {' '.join(TINY)}": "seconds seed segment window guidance shift steps device",
    "profile -o out --lengths 0 --heads 1 --head-dim 16": "lengths heads head-dim dtype device",
    f"profile -o out --model {MODEL} --lengths 0": "depth segment max-seconds lengths dtype",
    "demo none.mkv -o out": "frames seed lengths rate size fps seconds start",
    f"evaluate retrieval --model {MODEL} --video none.mkv": "clips history steps seed",
    "storyboard idea --lm none -o out": "seconds shots seed device",
    f"export {MODEL} -o out/x": "dtype base",
}


def option_case(rng: random.Random) -> Case:
    """A command with an option of a hostile value."""
    command = rng.choice(sorted(OPTIONS))
    option = rng.choice(OPTIONS[command].split())
    values = NAMES + SHAPES[-5:] if option in ("dtype", "method", "device", "base") else NUMBERS + SHAPES
    memory = (GOLDEN / "memories" / "dct-int8.safetensors").read_bytes()
    return Case({"m": memory, "b": json.dumps(BOARD).encode()}, [*command.split(), f"--{option}={rng.choice(values)}"])


FORMATS: dict[str, Callable[[random.Random], Case]] = {
    "memory": memory_case,
    "model": model_case,
    "vae": vae_case,
    "adapter": adapter_case,
    "recipe": recipe_case,
    "captions": captions_case,
    "storyboard": storyboard_case,
    "film": film_case,
    "run": run_case,
    "result": result_case,
    "options": option_case,
}


def draw(name: str, seed: int) -> Case:
    """The case of a format and a seed, always the same."""
    with unlimited():
        return FORMATS[name](random.Random(f"{name} {seed}"))


_RUN: dict[str, bytes] = {}


def prepared_run() -> dict[str, bytes]:
    """The golden run that was stopped, with the cache of its latents, which the first call makes."""
    if not _RUN:
        with tempfile.TemporaryDirectory() as scratch, Worker() as worker:
            base = Path(scratch) / "base"
            base.mkdir()
            link_golden(base)
            shutil.unpack_archive(GOLDEN / "training" / "one.zip", base)
            kept = {path: path.read_bytes() for path in (base / "one").rglob("*") if path.is_file()}
            result = worker.run(base, ["pretrain", "one.yaml"])
            assert result.code == 0, result
            kept |= {path: path.read_bytes() for path in (base / "latents").rglob("*") if path.is_file()}
            _RUN.update({str(path.relative_to(base)): content for path, content in kept.items()})
    return _RUN
