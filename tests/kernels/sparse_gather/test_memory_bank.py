"""MemoryBank: what it holds comes back, from memory and from disk."""

import copy
import os
import pickle
import random

import pytest
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, fill, ids, refuses, stored

from vidmem_kernels import MemoryBank
from vidmem_kernels.sparse_gather import memory_bank


@pytest.fixture(params=["device", "mmap"])
def make_bank(request, tmp_path):
    """Makes banks of each storage that needs no GPU."""
    made = []

    def make(channels, **kwargs):
        made.append(None)
        path = tmp_path / f"working-{len(made)}" if request.param == "mmap" else None
        return MemoryBank(channels, storage=request.param, path=path, **kwargs)

    return make


def test_by_hand(make_bank):
    bank = make_bank(2)
    bank.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    bank.append(torch.tensor([[5.0, 6.0]]), torch.tensor([[6.0, 7.0, 8.0]]))
    assert len(bank) == 3 and bank.channels == 2
    assert bank.positions.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert bank.gather(torch.tensor([2, -1, 0])).tolist() == [[5, 6], [0, 0], [1, 2]]
    batched = bank.gather(torch.tensor([[1], [2]], dtype=torch.int32), out_dtype=torch.bfloat16)
    assert batched.tolist() == [[[3, 4]], [[5, 6]]] and batched.dtype == torch.bfloat16
    assert bank.nbytes == 3 * (2 * 4 + 3 * 4)


def test_int8_by_hand(make_bank):
    bank = make_bank(2, dtype=torch.int8)
    bank.append(torch.tensor([[127.0, 63.4], [0.0, 0.0]]), torch.zeros(2, 3))
    assert bank.gather(torch.tensor([0, 1])).tolist() == [[127, 63], [0, 0]]
    assert bank.nbytes == 2 * (2 + 4 + 12)


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_many_appends_grow_by_doubling(dtype, make_bank, monkeypatch):
    bank = make_bank(5, dtype=dtype)
    grown = []
    grow = MemoryBank._grow
    monkeypatch.setattr(MemoryBank, "_grow", lambda self, rows: (grown.append(rows), grow(self, rows))[1])
    expected, places = [], []
    for i in range(200):
        tokens, positions = fill(bank, i % 4, seed=i)
        expected.append(stored(tokens, dtype))
        places.append(positions)
    assert len(bank) == 300
    assert grown == [64, 128, 256, 512]
    assert bank.capacity_bytes == 512 * bank.nbytes // 300
    assert torch.equal(bank.positions, torch.cat(places))
    assert torch.equal(bank.gather(torch.arange(300), out_dtype=torch.float32), torch.cat(expected))


def test_capacity_is_taken_at_once(make_bank, monkeypatch):
    bank = make_bank(3, capacity=100)
    monkeypatch.setattr(MemoryBank, "_grow", lambda *_: pytest.fail("grew"))
    fill(bank, 100)
    assert bank.capacity_bytes == bank.nbytes == 100 * (3 * 4 + 12)


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_bytes_are_those_of_the_tensors(dtype, storage, tmp_path):
    def check(bank, file=None):
        rows, scale = bank._rows, torch.empty(0) if bank._scale is None else bank._scale
        assert bank.nbytes == sum(t[: len(bank)].nbytes for t in (rows, scale, bank._positions))
        on_disk = os.fstat(file.fileno()) if file else None
        if on_disk:
            assert on_disk.st_size == rows.nbytes and on_disk.st_blocks * 512 >= rows.nbytes
        else:
            assert rows.untyped_storage().nbytes() == rows.nbytes
        others = scale.untyped_storage().nbytes() + bank._positions.untyped_storage().nbytes()
        assert bank.capacity_bytes == rows.nbytes + others

    bank = MemoryBank(5, dtype=dtype, storage=storage, path=tmp_path / "working" if storage == "mmap" else None)
    for count in (1, 63, 1, 500):
        fill(bank, count)
        check(bank, bank._file)
    bank.save(tmp_path / "bank")
    loaded = MemoryBank.load(tmp_path / "bank", storage=storage)
    assert loaded.nbytes == loaded.capacity_bytes == bank.nbytes
    fill(loaded, 3)
    check(loaded, loaded._file)


def test_empty_bank(make_bank):
    bank = make_bank(3, dtype=torch.int8)
    assert len(bank) == bank.nbytes == bank.capacity_bytes == 0
    assert bank.positions.shape == (0, 3)
    bank.append(torch.zeros(0, 3), torch.zeros(0, 3))
    assert bank.gather(torch.tensor([-1])).tolist() == [[0, 0, 0]]
    assert bank.gather(torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    values, index = bank.topk(torch.zeros(2, 3), 0)
    assert values.shape == index.shape == (2, 0)


def test_inference_mode_ends_where_it_ends(make_bank, tmp_path):
    with torch.inference_mode():
        bank = make_bank(3, dtype=torch.int8, capacity=2)
        tokens, positions = fill(bank, 65)
        bank.save(tmp_path / "bank")
        loaded = MemoryBank.load(tmp_path / "bank", storage=bank.storage)
    for held in (bank, loaded):
        more, _ = fill(held, 65, seed=1)
        assert torch.equal(held.gather(torch.arange(130)), stored(torch.cat([tokens, more]), torch.int8))
        assert torch.equal(held.positions[:65], positions)
        with torch.inference_mode():
            fill(held, 1)
        assert len(held) == 131


def test_gathered_rows_and_positions_survive_later_appends(make_bank):
    bank = make_bank(4)
    tokens, positions = fill(bank, 64)
    before, rows = bank.positions, bank.gather(torch.arange(64))
    fill(bank, 200, seed=1)
    assert torch.equal(before, positions) and torch.equal(rows, tokens)


def test_appends_of_any_float_dtype_and_strides(make_bank):
    bank = make_bank(3, dtype=torch.float16)
    tokens = torch.randn(3, 5)
    bank.append(tokens.T.double(), torch.zeros(3, 5).T)
    bank.append(tokens.T.bfloat16(), torch.zeros(5, 3))
    assert torch.equal(bank.gather(torch.arange(5)), tokens.T.half())
    assert torch.equal(bank.gather(torch.arange(5, 10)), tokens.T.bfloat16().half())


def test_append_refuses_and_leaves_the_bank_as_it_was(make_bank):
    bank = make_bank(3, dtype=torch.float16)
    fill(bank, 4)
    before = bank.gather(torch.arange(4))
    ok, at = torch.zeros(2, 3), torch.zeros(2, 3)
    name = "MemoryBank.append: "
    refuses(ValueError, name + "tokens must have 3 channels, got 4", bank.append, torch.zeros(2, 4), at)
    refuses(ValueError, name + "tokens must have shape (K, C), got (2, 3, 1)", bank.append, ok.unsqueeze(2), at)
    refuses(ValueError, name + "positions must have shape (2, 3), got (1, 3)", bank.append, ok, at[:1])
    refuses(ValueError, name + "positions must have shape (2, 3), got (2, 2)", bank.append, ok, at[:, :2])
    refuses(TypeError, name + "positions must be float32, got int64", bank.append, ok, at.long())
    refuses(TypeError, name + "tokens must be a tensor, got list", bank.append, [[1.0, 2.0, 3.0]], at)
    refuses(
        TypeError,
        name + "tokens must be float32, bfloat16, float16 or float64, got int8",
        bank.append,
        ok.to(torch.int8),
        at,
    )
    limit = "tokens must be finite and at most 65504 in magnitude, got 1 rows that are not"
    for bad in (float("nan"), float("inf"), 70000.0):
        refuses(ValueError, name + limit, bank.append, torch.tensor([[0.0] * 3, [1.0, bad, 1.0]]), at)
        if bad != 70000.0:
            refuses(
                ValueError,
                name + "positions must be finite, got 2 rows that are not",
                bank.append,
                ok,
                torch.full((2, 3), bad),
            )
    gradient = "tokens and positions must not require a gradient, which the bank does not keep; detach them or use"
    with_grad = torch.zeros(2, 3, requires_grad=True)
    refuses(ValueError, f"{name}{gradient} torch.no_grad()", bank.append, with_grad, at)
    assert len(bank) == 4 and torch.equal(bank.gather(torch.arange(4)), before)
    with torch.no_grad():
        bank.append(with_grad, at)
    assert len(bank) == 6 and not bank.gather(torch.arange(6)).requires_grad


@pytest.mark.parametrize("dtype", QUANTIZED, ids=ids)
def test_quantized_append_refuses_what_is_not_finite(dtype):
    bank = MemoryBank(2, dtype=dtype)
    with pytest.raises(ValueError, match="tokens must be finite"):
        bank.append(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), torch.zeros(2, 3))
    assert len(bank) == 0


def test_gather_refuses(make_bank):
    bank = make_bank(3)
    fill(bank, 4)
    name = "MemoryBank.gather: "
    refuses(TypeError, name + "index must be int32 or int64, got float32", bank.gather, torch.zeros(2))
    refuses(ValueError, name + "index must have shape (B, K), got ()", bank.gather, torch.tensor(1))
    refuses(IndexError, "gather_tokens: index must be in [-1, 3], got 4", bank.gather, torch.tensor([4]))


def test_constructor_refuses(tmp_path):
    name = "MemoryBank: "
    refuses(ValueError, name + "channels must be at least 1, got 0", MemoryBank, 0)
    refuses(TypeError, name + "channels must be an int, got float", MemoryBank, 2.0)
    refuses(ValueError, name + "capacity must be at least 0, got -1", MemoryBank, 2, capacity=-1)
    refuses(
        TypeError,
        name + "dtype must be float32, bfloat16, float16, int8 or float8_e4m3fn, got torch.float64",
        MemoryBank,
        2,
        dtype=torch.float64,
    )
    refuses(ValueError, name + "storage must be device, pinned or mmap, got 'disk'", MemoryBank, 2, storage="disk")
    need = name + "path is required for storage 'mmap' and not allowed for others, got "
    refuses(ValueError, need + "None for 'mmap'", MemoryBank, 2, storage="mmap")
    refuses(ValueError, need + "'x' for 'device'", MemoryBank, 2, path="x")
    taken = tmp_path / "taken"
    taken.write_text("precious")
    with pytest.raises(FileExistsError):
        MemoryBank(2, storage="mmap", path=taken)
    assert taken.read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_pinned_needs_a_gpu(tmp_path):
    text = "storage 'pinned' requires a CUDA device, got none"
    refuses(RuntimeError, f"MemoryBank: {text}", MemoryBank, 2, storage="pinned")
    bank = MemoryBank(2)
    bank.save(tmp_path / "bank")
    refuses(RuntimeError, f"MemoryBank.load: {text}", MemoryBank.load, tmp_path / "bank", storage="pinned")


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("device", "storage"),
    [
        ("cpu", "device"),
        ("cpu", "mmap"),
        *[pytest.param("cuda", storage, marks=GPU) for storage in ("device", "pinned", "mmap")],
    ],
)
def test_on_a_device(dtype, device, storage, tmp_path):
    """Everything the bank does, on each device, against plain torch on the dequantised rows."""
    path = tmp_path / "working" if storage == "mmap" else None
    bank = MemoryBank(5, dtype=dtype, device=device, storage=storage, path=path)
    tokens, positions = fill(bank, 100)
    bank.save(tmp_path / "bank")
    where = "cpu" if storage == "mmap" else device  # CUDA reads no mapped rows
    index = torch.tensor([[3, -1, 99]], device=where)
    for held in (bank, MemoryBank.load(tmp_path / "bank", device=device, storage=storage)):
        for kept in (held._rows, held._scale):
            assert kept is None or kept.is_pinned() == (storage == "pinned")
        assert held.positions.device.type == device and torch.equal(held.positions.cpu(), positions)
        more, _ = fill(held, 100, seed=1)
        expected = torch.cat([stored(tokens, dtype), stored(more, dtype)])
        got = held.gather(index, out_dtype=torch.float32)
        assert got.device.type == where and torch.equal(got[0, ::2].cpu(), expected[[3, 99]]) and not got[0, 1].any()

        query = expected[:4]
        values, found = held.topk(query.to(device), 7)
        assert values.device.type == found.device.type == device and found.dtype == torch.int32
        scores = query.double() @ expected.double().T
        # What is found has the scores it should, and nothing that is left out has a larger one, up to the rounding of
        # the product, of five sums and of the factor in float32.
        rounding = 7 * 2**-24 * float((query.double().abs() @ expected.double().abs().T).max())
        for wanted in (scores.gather(1, found.cpu().long()), scores.sort(dim=1, descending=True).values[:, :7]):
            assert (values.cpu().double() - wanted).abs().max() <= rounding
        assert all(len(set(row)) == 7 for row in found.tolist())
        assert len(held) == 200


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_sizes_of_zero(dtype, make_bank, tmp_path):
    """No rows, no queries, no batch, nothing to find: empty results, whatever else is drawn."""
    for seed in range(40):
        draw = random.Random(f"{dtype} {seed}")
        bank = make_bank(draw.choice([1, 4]), dtype=dtype, capacity=draw.choice([0, 0, 3]))
        tokens = torch.zeros(0, bank.channels)
        for count in (draw.choice([0, 1, 3]) for _ in range(draw.choice([0, 1, 3]))):
            tokens = torch.cat([tokens, fill(bank, count, seed=count)[0]])
        if draw.random() < 0.5:
            bank.save(tmp_path / "bank")
            load = draw.choice([MemoryBank.load, MemoryBank.from_safetensors])
            bank = load(tmp_path / "bank", storage=bank.storage)
        bank = draw.choice([lambda b: b, copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])(bank)
        bank.append(torch.zeros(0, bank.channels, dtype=torch.float64), torch.zeros(0, 3))
        rows, count = stored(tokens, dtype), len(tokens)
        assert len(bank) == count and bank.positions.shape == (count, 3)
        assert f"({count} x {bank.channels}, " in repr(bank) and len(repr(bank)) < 60
        assert bank.nbytes == count * (bank.channels * dtype.itemsize + 12 + 4 * (dtype in QUANTIZED))
        assert bank.capacity_bytes >= bank.nbytes

        kind = draw.choice([torch.int32, torch.int64])
        for shape in ((0,), (0, 0), (0, 3), (2, 0), (3,), (2, 2)):
            index = torch.randint(-1, count, shape, dtype=kind) if count else torch.full(shape, -1, dtype=kind)
            got = bank.gather(index, torch.float32)
            assert got.shape == (*shape, bank.channels)
            assert torch.equal(got, torch.cat([rows, torch.zeros(1, bank.channels)])[index.long()])
        with pytest.raises(IndexError, match=rf"index must be in \[-1, {count - 1}\], got {count}"):
            bank.gather(torch.tensor([count], dtype=kind))
        for queries in (0, 2):
            query = torch.randn(queries, bank.channels)
            for k in {0, count}:
                values, found = bank.topk(query, k)
                assert values.shape == found.shape == (queries, k)
                assert found.sort(dim=1).values.tolist() == [list(range(k))] * queries
            refuses(
                ValueError,
                f"MemoryBank.topk: k must be in [0, {count}], got {count + 1}",
                bank.topk,
                query,
                count + 1,
            )
        name, wide = "MemoryBank.append: ", bank.channels + 1
        text = f"tokens must have {bank.channels} channels, got {wide}"
        refuses(ValueError, name + text, bank.append, torch.zeros(0, wide), torch.zeros(0, 3))
        text = "positions must have shape (0, 3), got (1, 3)"
        refuses(ValueError, name + text, bank.append, torch.zeros(0, bank.channels), torch.zeros(1, 3))
        fill(bank, 2)
        assert len(bank) == count + 2


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_topk_by_loops(dtype, make_bank, monkeypatch):
    bank = make_bank(4, dtype=dtype)
    tokens = torch.randint(-3, 4, (23, 4)).float()
    tokens[:, 0] = torch.tensor([448.0 * 127, 127.0])[(torch.arange(23) % 2)]  # scales that are powers or exact
    if dtype == torch.float16:
        tokens[:, 0] = 128
    bank.append(tokens, torch.zeros(23, 3))
    rows = stored(tokens, dtype)
    query = torch.randint(-2, 3, (3, 4)).float()
    expected = []
    for q in query.double():
        scores = [float((q * row).sum()) for row in rows.double()]
        order = sorted(range(23), key=lambda i: (-scores[i], i))[:9]
        expected.append((order, [scores[i] for i in order]))
    for elements in (memory_bank._SCORED_ELEMENTS, 5 * 4, 1):  # all rows at once, five, one at a time
        monkeypatch.setattr(memory_bank, "_SCORED_ELEMENTS", elements)
        values, index = bank.topk(query, 9)
        assert index.dtype == torch.int32 and values.dtype == torch.float32
        for i, (order, scores) in enumerate(expected):
            torch.testing.assert_close(values[i].double(), torch.tensor(scores, dtype=torch.float64))
            if dtype not in QUANTIZED:  # every product is exact: ties are ties
                assert index[i].tolist() == order


def test_topk_ties_and_nan(make_bank):
    bank = make_bank(1)
    bank.append(torch.tensor([[1.0], [3.0], [1.0], [3.0]]), torch.zeros(4, 3))
    values, index = bank.topk(torch.tensor([[1.0], [-1.0], [float("nan")]]), 3)
    assert index.tolist() == [[1, 3, 0], [0, 2, 1], [0, 1, 2]]
    assert values[:2].tolist() == [[3, 3, 1], [-1, -1, -3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = bank.topk(torch.tensor([[1.00390625]]), 1)
    assert exact[0].item() == 3 * 1.00390625


def test_topk_refuses(make_bank):
    bank = make_bank(3)
    fill(bank, 4)
    name = "MemoryBank.topk: "
    refuses(ValueError, name + "k must be in [0, 4], got 5", bank.topk, torch.zeros(1, 3), 5)
    refuses(ValueError, name + "query must have 3 channels, got 2", bank.topk, torch.zeros(1, 2), 1)
    refuses(ValueError, name + "query must have shape (Q, C), got (3,)", bank.topk, torch.zeros(3), 1)
    refuses(
        TypeError,
        name + "query must be float32, bfloat16 or float16, got float64",
        bank.topk,
        torch.zeros(1, 3, dtype=torch.float64),
        1,
    )
    bank._count = 2**31  # an index of int32 could not name the last row
    text = "the bank must have at most 2147483647 rows, got 2147483648"
    refuses(ValueError, name + text, bank.topk, torch.zeros(1, 3), 1)


def test_failed_growth_leaves_the_bank_as_it_was(tmp_path, monkeypatch):
    bank = MemoryBank(4, storage="mmap", path=tmp_path / "working")
    tokens, _ = fill(bank, 64)

    def full(file, offset, size):
        os.truncate(file, size // 2 + 1024)  # a disk may give a part of what was asked for
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        fill(bank, 1)
    with pytest.raises(OSError, match="No space left"):
        MemoryBank(4, storage="mmap", path=tmp_path / "other", capacity=9)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["working"]
    assert (tmp_path / "working").stat().st_size == 64 * 4 * 4
    assert len(bank) == 64 and torch.equal(bank.gather(torch.arange(64)), tokens)
    fill(bank, 1)
    assert len(bank) == 65
