"""Draws docs/architecture.svg from the code: the way of a call, the ops with their kernels, the rooms of the model.

    python docs/site/draw_architecture.py

The ops come from the registry, the rooms from the table in CONTRIBUTING.md, and what a room calls from its imports.
Nothing in the picture depends on the machine or on what is compiled.
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vidmem_kernels import __all__ as PUBLIC  # noqa: E402
from vidmem_kernels._dispatch import LADDERS  # noqa: E402
from vidmem_kernels._op import OPS, Op  # noqa: E402
from vidmem_kernels._verified import cuda_fingerprints  # noqa: E402

PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, MARGIN = 720, 20
RIGHT = WIDTH - MARGIN
TITLES = {
    "token_merge": "Token merging",
    "sparse_gather": "Sparse gathering",
    "linear_attn": "Linear attention",
    "cross_attn": "Cross-attention",
}
# backend -> (title, where its kernels are, colour)
BACKENDS = {
    "cpu": ("C++", "csrc/cpu", "#3b82d6"),
    "library": ("library", "library*.py", "#b7791f"),
    "triton": ("Triton", "triton_*.py", "#8b6be8"),
    "cuda": ("CUDA C++", "csrc/cuda", "#3f9d46"),
    "reference": ("reference", "reference.py", "#7d8590"),
}
STYLE = """
  .page { fill: #ffffff; stroke: #d5d8de; }
  .box { fill: #f4f6fa; stroke: #9aa3b2; }
  .line { stroke: #9aa3b2; stroke-width: 1.5; fill: none; }
  .rule { stroke: #d5d8de; }
  .head { fill: #9aa3b2; }
  text { fill: #1c2230; font: 14px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
  .title { font-size: 18px; font-weight: 600; }
  .group { font-weight: 600; }
  .name { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
  .quiet { fill: #5b6475; font-size: 13px; }
  .middle { text-anchor: middle; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1c2028; stroke: #3a4150; }
    .box { fill: #272d38; stroke: #6b7486; }
    .rule { stroke: #3a4150; }
    text { fill: #e6e9ef; }
    .quiet { fill: #aab2c0; }
  }
"""


class Drawing:
    """Shapes that are put below one another; `y` is where the next begins."""

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.y = MARGIN

    def text(self, x: float, y: float, text: str, classes: str = "") -> None:
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" class="{classes}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: str | None = None) -> None:
        style = f' style="stroke: {colour}; stroke-width: 2"' if colour else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="box"{style}/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        self.shapes.append(f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" class="line" marker-end="url(#head)"/>')

    def rule(self, y: float) -> None:
        self.shapes.append(f'<path d="M{MARGIN} {y:g} H{RIGHT}" class="rule"/>')

    def title(self, text: str, remark: str) -> None:
        self.text(MARGIN, self.y + 18, text, "title")
        self.text(MARGIN, self.y + 40, remark, "quiet")
        self.y += 56

    def svg(self, description: str) -> str:
        height = self.y + MARGIN
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{escape(description)}</title>",
            f"<style>{STYLE}</style>",
            f'<defs>{head}<path d="M0 0 L8 4 L0 8 z" class="head"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="page"/>',
            *self.shapes,
            "</svg>\n",
        ])  # fmt: skip


def draw_call(drawing: Drawing) -> None:
    """The files that a call passes, from top to bottom, and the backends that it ends in."""
    drawing.title("The way of a call", "A gradient is an op too, and takes the backend of its forward.")
    steps = [
        ("vidmem_kernels.<function>(…)", "<family>/api.py: what the arguments mean is checked"),
        ("torch.ops.vidmem.<op>(…, backend)", "<family>/ops.py: schema, shapes, autocast, gradient, torch.compile"),
        (
            "_dispatch.select(…)",
            "takes the first backend that can run this call, and keeps the reasons of those that cannot",
        ),
    ]
    for name, what in steps:
        drawing.box(MARGIN, drawing.y, RIGHT - MARGIN, 52)
        drawing.text(MARGIN + 14, drawing.y + 22, name, "name")
        drawing.text(MARGIN + 14, drawing.y + 42, what, "quiet")
        drawing.y += 52
        if name != steps[-1][0]:
            drawing.arrow(WIDTH / 2, drawing.y, WIDTH / 2, drawing.y + 20)
            drawing.y += 20
    space, gap = RIGHT - MARGIN, 10
    width = (space - gap * (len(BACKENDS) - 1)) / len(BACKENDS)
    for number, (title, where, colour) in enumerate(BACKENDS.values()):
        x = MARGIN + number * (width + gap)
        drawing.arrow(x + width / 2, drawing.y, x + width / 2, drawing.y + 26)
        drawing.box(x, drawing.y + 28, width, 52, colour)
        drawing.text(x + width / 2, drawing.y + 50, title, "group middle")
        drawing.text(x + width / 2, drawing.y + 69, where, "quiet middle")
    drawing.y += 80
    for device, ladder in LADDERS.items():
        order = ", then ".join(BACKENDS[backend][0] for backend in ladder)
        drawing.text(MARGIN, drawing.y + 24, f"On {'the CPU' if device == 'cpu' else 'a GPU'}: {order}.", "quiet")
        drawing.y += 22
    drawing.y += 34


def kernels(op: Op, sources: str, in_cuda: set[str]) -> list[str]:
    """The backends of an op."""
    there = {
        "cpu": f'm.impl("{op.name}"' in sources,
        "library": bool(op.library),
        "triton": op.triton is not None,
        "cuda": op.name in in_cuda,
        "reference": True,
    }
    return [backend for backend, is_there in there.items() if is_there]


def draw_ops(drawing: Drawing) -> None:
    """A row for each op that is no gradient, under its family, with a dot for each kernel."""
    drawing.title("The ops and their kernels", "In grey: ops that a public function calls for a part of its work.")
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")))
    in_cuda = set(cuda_fingerprints(ROOT / "csrc"))
    columns = {backend: 292 + 76 * number for number, backend in enumerate([*BACKENDS, "gradient"])}
    for backend, x in columns.items():
        drawing.text(x, drawing.y + 14, BACKENDS[backend][0] if backend in BACKENDS else "gradient", "quiet middle")
    drawing.y += 24
    for family, title in TITLES.items():
        drawing.rule(drawing.y)
        drawing.text(MARGIN, drawing.y + 22, title, "group")
        drawing.y += 30
        ops = [op for op in OPS.values() if op.family.endswith(family) and not op.name.endswith("_backward")]
        for op in sorted(ops, key=lambda op: op.name not in PUBLIC):  # the public ones first
            drawing.text(MARGIN + 10, drawing.y + 15, op.name, "name" if op.name in PUBLIC else "name quiet")
            for backend in kernels(op, sources, in_cuda):
                drawing.shapes.append(
                    f'<circle cx="{columns[backend]}" cy="{drawing.y + 11:g}" r="5" fill="{BACKENDS[backend][2]}"/>'
                )
            drawing.text(columns["gradient"], drawing.y + 15, "yes" if op.backward else "–", "quiet middle")
            drawing.y += 22
        drawing.y += 8
    drawing.y += 26


def rooms() -> list[list[str]]:
    """The rows of the table in CONTRIBUTING.md: rooms of vidmem_model, the ground floor first."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| Room |") :].split("\n\n")[0]
    return [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()[2:]]


def called(room: str) -> set[str]:
    """What the files of a room import from vidmem_kernels and its adapters for diffusers."""
    folder = ROOT / "python" / "vidmem_model"
    files = sorted((folder / room).rglob("*.py")) or [folder / f"{room}.py"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    sources = ("vidmem_kernels", "vidmem_kernels.diffusers")
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module in sources and not node.level]
    return {alias.name for node in found for alias in node.names}


def lines(names: list[str], width: int) -> list[str]:
    """The names with commas between them, in lines of at most `width` letters."""
    found: list[str] = []
    for number, name in enumerate(names):
        word = name + ("," if number < len(names) - 1 else "")
        if found and len(found[-1]) + 1 + len(word) <= width:
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def draw_rooms(drawing: Drawing) -> None:
    """A row for each floor of vidmem_model: its rooms, and what they call."""
    drawing.title(
        "The rooms of vidmem_model",
        "Right: what a room calls of vidmem_kernels. It imports the rooms above it, never one below.",
    )
    for row in rooms():
        names = lines(row, 30)
        calls = lines(sorted(set().union(*map(called, row)), key=lambda name: (name.lower(), name)), 46)
        drawing.rule(drawing.y)
        for number, line in enumerate(names):
            drawing.text(MARGIN, drawing.y + 19 + 18 * number, line, "name")
        for number, line in enumerate(calls):
            drawing.text(MARGIN + 280, drawing.y + 19 + 18 * number, line, "name quiet")
        drawing.y += 12 + 18 * max(len(names), len(calls))


@cache
def picture() -> str:
    """The whole picture, as SVG."""
    drawing = Drawing()
    draw_call(drawing)
    draw_ops(drawing)
    draw_rooms(drawing)
    return drawing.svg("The way of a call, the ops with their kernels, and the rooms of vidmem_model")


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
