"""Modifies a memory file's header and tensors."""

import json
import math
import struct


def text(name, value):
    """Change a text of the header."""

    def change(file):
        file.texts[name] = value if isinstance(value, str) else json.dumps(value)

    return change


def tensor(name, dtype, value, shape=None):
    """Change a tensor to equal numbers of a dtype."""
    form = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b"}[dtype]

    def change(file):
        sizes = file.tensors[name][1] if shape is None else shape
        file.tensors[name] = dtype, sizes, struct.pack("<" + form, value) * math.prod(sizes)

    return change


def one_number(name, form, value):
    """Change the last number of a tensor."""

    def change(file):
        dtype, shape, data = file.tensors[name]
        new = struct.pack("<" + form, value)
        file.tensors[name] = dtype, shape, data[: -len(new)] + new

    return change
