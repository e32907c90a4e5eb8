"""Files that another program wrote or rewrote: told from damaged ones, and imported as they are."""

import json
import random

import pytest
import safetensors.torch
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, fill, ids, refuses, stored

from vidmem_kernels import MemoryBank, MemoryFileError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
POSITIONS = [dtype for dtype in NAMES if dtype not in (torch.float8_e4m3fn, torch.bool)]
LOAD, IMPORT = "MemoryBank.load", "MemoryBank.from_safetensors"


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path, tensors, metadata, draw):
    """A safetensors file as another program may write it: other order, gaps, spaces and padding."""
    names = list(tensors)
    draw.shuffle(names)
    gap = draw.choice([0, 0, 8, 64])
    data, entries = b"", {}
    for name in names:
        piece = bytes_of(tensors[name])
        offsets = [len(data), len(data) + len(piece)]
        entries[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": offsets,
        }
        data += piece + b"\x55" * (-len(data + piece) % gap if gap else 0)
    items = list(entries.items())
    draw.shuffle(items)
    if metadata is not None:
        items.insert(draw.randrange(len(items) + 1), ("__metadata__", metadata))
    text = json.dumps(dict(items), **draw.choice([{}, {"separators": (",", ":")}, {"indent": 1}])).encode()
    text += b" " * (-(8 + len(text)) % draw.choice([1, 8, 64]))
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rewritten(path, draw, metadata):
    """Reads a bank's file by the safetensors package and writes it again, in one of many ways."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    if metadata == "stripped":
        header = None
    elif metadata == "user's":
        header = {key: value for key, value in header.items() if not key.startswith("vidmem.")}
    else:
        header = dict(draw.sample(list(header.items()), len(header)))
    if draw.random() < 0.3:
        safetensors.torch.save_file(tensors, path, header)
    else:
        write(path, tensors, header, draw)


def refused(path):
    with pytest.raises(MemoryFileError) as caught:
        MemoryBank.load(path)
    return str(caught.value)


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
@pytest.mark.parametrize("metadata", ["kept", "stripped", "user's"])
def test_a_file_rewritten_by_another_program_is_imported(dtype, metadata, tmp_path):
    for seed in range(20):
        draw = random.Random(f"{dtype} {metadata} {seed}")
        bank = MemoryBank(draw.choice([1, 3, 8]), dtype=dtype)
        fill(bank, draw.choice([0, 1, 5, 70]), seed=seed)
        path = tmp_path / f"bank-{seed}"
        user, extras = {"a": "1", "film": "片"}, {"x": torch.arange(5), "flags": torch.tensor([True, False])}
        bank.save(path, user, extras)
        before = path.read_bytes()
        rewritten(path, draw, metadata)
        if path.read_bytes() != before:
            message = refused(path)
            assert message.startswith(f"{LOAD}: {path} is ") and "\n" not in message
            assert "rewritten by another program" in message and message.endswith(f"import it with {IMPORT}")
            assert "damaged" not in message
        for storage in ("device", "mmap"):
            got = MemoryBank.from_safetensors(path, storage=storage)
            assert (len(got), got.channels, got.dtype, got.storage) == (len(bank), bank.channels, dtype, storage)
            assert got.metadata == ({} if metadata == "stripped" else user)
            assert got.extras.keys() == extras.keys() and torch.equal(got.extras["x"], extras["x"])
            assert torch.equal(got._rows.view(torch.uint8), bank._rows[: len(bank)].view(torch.uint8))
            assert torch.equal(got.positions, bank.positions)
            assert dtype not in QUANTIZED or torch.equal(got._scale, bank._scale[: len(bank)])
            kept = path.read_bytes()
            fill(got, 3)
            assert path.read_bytes() == kept
            got.save(tmp_path / "again")
            again = MemoryBank.load(tmp_path / "again")
            assert len(again) == len(bank) + 3 and torch.equal(again.positions[: len(bank)], bank.positions)


def test_damage_is_not_taken_for_another_program(tmp_path):
    path = tmp_path / "bank"
    bank = MemoryBank(3, dtype=torch.int8)
    fill(bank, 5)
    bank.save(path, {"k": "v"}, {"x": torch.arange(3)})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for at in range(start, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "is damaged (its checksum does not match" in refused(path)
    for name in (b'"rows"', b'"positions"', b'"extras.x"', b'"k"', b"vidmem.checksum"):
        at = content.index(name) + 1
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert "is damaged" in refused(path)


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_a_plain_file_is_imported(dtype, tmp_path):
    for seed in range(20):
        draw = random.Random(f"{dtype} {seed}")
        count, channels = draw.choice([0, 1, 9]), draw.choice([1, 6])
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(count, channels, generator=generator)
        one = MemoryBank(channels, dtype=dtype)
        one.append(tokens, torch.zeros(count, 3))
        kind = draw.choice(POSITIONS)
        places = torch.randint(0, 100, (count, 3), generator=generator).to(kind)
        tensors = {"latents": one._rows[:count], "where": places, "more": torch.ones(2, 2), "extras.y": torch.zeros(1)}
        if dtype in QUANTIZED:
            tensors["factor"] = one._scale[:count].to(draw.choice([torch.float32, torch.float64]))
        write(tmp_path / "plain", tensors, draw.choice([None, {"k": "v"}]), draw)
        bank = MemoryBank.from_safetensors(tmp_path / "plain", rows="latents", positions="where", scale="factor")
        assert torch.equal(bank.gather(torch.arange(count), torch.float32), stored(tokens, dtype))
        assert bank.positions.dtype == torch.float32 and torch.equal(bank.positions, places.float())
        assert torch.equal(bank.extras["more"], torch.ones(2, 2)) and bank.extras.keys() == {"more", "y"}
        same = MemoryBank.from_tensors(tensors["latents"], places, tensors.get("factor"))
        assert torch.equal(same.gather(torch.arange(count), torch.float32), stored(tokens, dtype))
        assert torch.equal(same.positions, places.float())


def test_from_tensors_copies_into_any_storage(tmp_path):
    rows, positions = torch.randn(70, 3), torch.rand(70, 3)
    banks = [
        MemoryBank.from_tensors(rows, positions),
        MemoryBank.from_tensors(rows, positions, storage="mmap", path=tmp_path / "working"),
    ]
    kept = rows.clone()
    rows.zero_()
    for bank in banks:
        assert torch.equal(bank.gather(torch.arange(70)), kept)
        fill(bank, 3)
        assert len(bank) == 73
    assert len(MemoryBank.from_tensors(torch.zeros(0, 3), torch.zeros(0, 3))) == 0


def wrong_parts():
    rows, at = torch.zeros(2, 3), torch.zeros(2, 3)
    dtypes = "float32, bfloat16, float16, int8 or float8_e4m3fn"
    given = "scale is required for int8 or float8_e4m3fn rows and not allowed for others, got"
    nan, inf = float("nan"), float("inf")
    yield TypeError, f"rows must be {dtypes}, got float64", rows.double(), at, None
    yield TypeError, f"rows must be {dtypes}, got bool", rows.bool(), at, None
    yield ValueError, "rows must have shape (M, C), got (6,)", rows.reshape(6), at, None
    yield ValueError, "rows must have at least 1 channel, got shape (2, 0)", rows[:, :0], at, None
    yield ValueError, "positions must have shape (2, 3), got (1, 3)", rows, at[:1], None
    yield ValueError, "positions must have shape (2, 3), got (2, 2)", rows, at[:, :2], None
    kinds = "float32, bfloat16, float16, float64, int64, int32, int16, int8 or uint8"
    yield TypeError, f"positions must be {kinds}, got bool", rows, at.bool(), None
    yield TypeError, f"{given} int8 rows and no scale", rows.to(torch.int8), at, None
    yield TypeError, f"{given} float8_e4m3fn rows and no scale", rows.to(torch.float8_e4m3fn), at, None
    yield TypeError, f"{given} float32 rows and a scale", rows, at, torch.ones(2)
    yield ValueError, "scale must have shape (2,), got (3,)", rows.to(torch.int8), at, torch.ones(3)
    yield ValueError, "scale must have shape (M), got (2, 1)", rows.to(torch.int8), at, torch.ones(2, 1)
    floats = "float32, bfloat16, float16 or float64"
    yield TypeError, f"scale must be {floats}, got int32", rows.to(torch.int8), at, torch.ones(2).int()
    yield ValueError, "rows must be finite, got 1 rows that are not", torch.tensor([[0, inf], [0, 0]]), at, None
    float8 = torch.tensor([[0, nan], [0, nan]]).to(torch.float8_e4m3fn)
    yield ValueError, "rows must be finite, got 2 rows that are not", float8, at, torch.ones(2)
    yield ValueError, "positions must be finite, got 2 rows that are not", rows, at + nan, None
    yield ValueError, "positions must be finite, got 2 rows that are not", rows, at.double() + 1e300, None
    yield ValueError, "scale must be finite, got 1 rows that are not", rows.to(torch.int8), at, torch.tensor([1, inf])
    far = "positions must be in [-16777216, 16777216] where they are integers, which float32 then holds exactly, got"
    yield ValueError, f"{far} 16777217", rows, torch.full((2, 3), 2**24 + 1), None
    yield ValueError, f"{far} -9223372036854775808", rows, torch.full((2, 3), -(2**63)), None


@pytest.mark.parametrize(("error", "message", "rows", "positions", "scale"), list(wrong_parts()))
def test_parts_that_do_not_fit(error, message, rows, positions, scale, tmp_path):
    op = "MemoryBank.from_tensors"
    refuses(error, f"{op}: {message}", MemoryBank.from_tensors, rows, positions, scale)
    parts = {"rows": rows, "positions": positions} | ({} if scale is None else {"scale": scale})
    write(tmp_path / "file", parts, None, random.Random(0))
    for storage in ("device", "mmap"):
        refuses(error, f"{IMPORT}: {message}", MemoryBank.from_safetensors, tmp_path / "file", storage=storage)
    path = tmp_path / "working"
    refuses(error, f"{op}: {message}", MemoryBank.from_tensors, rows, positions, scale, storage="mmap", path=path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"rows": entry("F32", [2, 3], 0, 24), "positions": entry("F32", [2, 3], 24, 48)}
ODD = (
    "must be float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int64, int32, int16, int8, uint8 or bool"
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": entry("F32", [2, 3], 0, 28)}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": entry("F32", [2, -3], 0, 24)}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": entry("F32", [2.0, 3], 0, 24)}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": entry("F32", [True, 6], 0, 24)}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": {"dtype": "F32"}}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": 7}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": entry("F32", [2, 3], 24, 48)}, MemoryFileError, "overlaps another"),
        ({"positions": entry("F32", [2, 3], 25, 49)}, MemoryFileError, "ends at byte 49 of 48"),
        ({"rows": entry("F32", [1 << 40, 3], 0, 12 << 40)}, MemoryFileError, "of 48"),
        ({"positions": entry("F32", [1 << 40, 3], 24, 24 + (12 << 40))}, MemoryFileError, "of 48"),
        ({"rows": entry("F32", [0, 1 << 62], 0, 0)}, MemoryFileError, "its header does not describe tensor 'rows'"),
        ({"rows": entry("C64", [2, 3], 0, 48)}, TypeError, f"tensor 'rows' {ODD}, got 'C64'"),
        ({"x": entry("U16", [0], 48, 48)}, TypeError, f"tensor 'x' {ODD}, got 'U16'"),
        ({"x": entry("U8", [0], 48, 48), "extras.x": entry("U8", [0], 48, 48)}, ValueError, "got both 'x' and"),
        ({"rows": None}, ValueError, "must have a tensor 'rows', got ['positions']"),
        ({"__metadata__": {"k": 1}}, TypeError, "metadata must be a dict of str to str, got 'k': 1"),
        ({"__metadata__": []}, MemoryFileError, "its metadata is not a JSON object"),
        (
            {"__metadata__": {"vidmem.format": "vidmem_kernels.MemoryBank", "vidmem.version": "2"}},
            MemoryFileError,
            "is of version '2', this vidmem_kernels reads version '1'",
        ),
    ],
)
def test_impossible_files(change, error, message, tmp_path):
    content = {key: value for key, value in (GOOD | change).items() if value is not None}
    text = json.dumps(content).encode()
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    for storage in ("device", "mmap"):
        with pytest.raises(error) as caught:
            MemoryBank.from_safetensors(path, storage=storage)
        assert str(caught.value).startswith(f"{IMPORT}: ") and message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_name_that_comes_twice(tmp_path):
    text = json.dumps(GOOD)[:-1].encode() + b', "rows": ' + json.dumps(GOOD["rows"]).encode() + b"}"
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(48))
    with pytest.raises(MemoryFileError, match="its header has 'rows' twice"):
        MemoryBank.from_safetensors(tmp_path / "file")


def test_files_cut_anywhere_and_any_bytes_are_refused(tmp_path):
    path, draw = tmp_path / "file", random.Random(5)
    safetensors.torch.save_file({"rows": torch.ones(2, 3), "positions": torch.ones(2, 3)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(MemoryFileError):
            MemoryBank.from_safetensors(path)
    for _ in range(200):
        text = bytes(draw.randrange(256) for _ in range(draw.randrange(60)))
        path.write_bytes(draw.choice([text, len(text).to_bytes(8, "little") + text]))
        with pytest.raises(MemoryFileError):
            MemoryBank.from_safetensors(path)
    with pytest.raises(FileNotFoundError):
        MemoryBank.from_safetensors(tmp_path / "none")


def test_nothing_is_unpickled(tmp_path):
    """A file of torch.save is refused before anything in it runs."""
    torch.save({"rows": torch.ones(2, 3), "positions": torch.ones(2, 3)}, tmp_path / "file")
    with pytest.raises(MemoryFileError, match="is not a safetensors file"):
        MemoryBank.from_safetensors(tmp_path / "file")
