"""The benchmark harness: what it measures, what it refuses to report, and the GPU script on a machine without one."""

import json
import os
import sys

import pytest
import torch
from paths import ROOT

import vidmem_kernels
from vidmem_kernels.testing import public_functions

sys.path.insert(0, str(ROOT))

from benchmarks import cases, lengths, measure, record, registry, report, run, timing, verify  # noqa: E402, F401
from benchmarks.registry import BENCHMARKS, Work, baseline  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402


def bench(tmp_path, *arguments):
    """Exit code and result of a run on smoke shapes."""
    path = tmp_path / "result.json"
    code = run.main([*arguments, "--shapes", "smoke", "--device", "cpu", "--seconds", "0.01", "-o", str(path)])
    return code, json.loads(path.read_text())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread and few rounds; measuring this machine's bandwidth takes a second and is not what is tested."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = timing.Rates(1e10, dict.fromkeys(registry.DTYPES, 1e11))
    monkeypatch.setattr(run, "measure_rates", lambda *_: rates)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 3)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def entry(monkeypatch):
    """A benchmark that is no part of the list: y = 2 x, with a right, a wrong, a failing and an absent baseline."""

    class Double(registry.Benchmark):
        differentiable = ("x",)
        factor = 2.0

        def make(self, s, dtype, device, rng):
            return {"x": registry.randn(rng, dtype, 1, s["M"], s["C"])}

        def call(self, x, s, backend):
            index = torch.arange(s["M"], dtype=torch.int32).unsqueeze(0)
            rows = vidmem_kernels.gather_tokens(x["x"], index, backend=backend)
            return rows * (2.0 if backend == "reference" else self.factor)

        def work(self, s, itemsize):
            return Work(2 * s["M"] * s["C"] * itemsize)

        work_backward = work

        @baseline("add")
        def add(self, x, s):
            return x["x"] + x["x"]

        @baseline("square")
        def square(self, x, s):
            return x["x"] * x["x"]

        @baseline("NaN")
        def nan(self, x, s):
            return x["x"] * 2 + torch.nan

        @baseline("raises")
        def raises(self, x, s):
            raise RuntimeError("no such thing")

        @baseline("unsupported")
        def unsupported(self, x, s):
            raise registry.Unsupported("too large")

        @baseline("absent", needs="a_module_that_nobody_has")
        def absent(self, x, s):
            raise AssertionError("must not run")

    double = Double()
    double.name, double.covers = "double", "gather_tokens"
    monkeypatch.setitem(BENCHMARKS, "double", double)
    monkeypatch.setitem(SHAPES, "double", SHAPES["gather_tokens"])
    return double


def test_result_file(tmp_path):
    code, result = bench(tmp_path, "--ops", "gather_tokens", "match_tokens_window", "--passes", "fwd", "bwd", "fwd+bwd")
    assert code == 0
    assert result["complete"] and result["device"]["type"] == "cpu" and result["device"]["name"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["rates"]["copy_gb_s"] == 10
    rows = result["rows"]
    assert {r["pass"] for r in rows if r["op"] == "gather_tokens"} == {"fwd", "bwd", "fwd+bwd"}
    assert {r["pass"] for r in rows if r["op"] == "match_tokens_window"} == {"fwd"}
    assert {r["kind"] for r in rows} >= {"ours", "baseline"}
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["best_ms"] <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["floor_fraction"] == pytest.approx(row["floor_ms"] / row["median_ms"])
        assert row["peak_bytes"] >= 0
    for ours in (r for r in rows if r["kind"] == "ours"):
        names = [r["contender"] for r in rows if (r["op"], r["pass"]) == (ours["op"], ours["pass"])]
        assert ours["best_baseline"] in names and ours["speedup"] > 0 and ours["backend"]
        others = [r for r in rows if (r["op"], r["pass"]) == (ours["op"], ours["pass"]) and r is not ours]
        assert ours["speedup"] == next(r["over_ours"] for r in others if r["contender"] == ours["best_baseline"])
    forward = next(r for r in rows if r["op"] == "gather_tokens")
    assert forward["bytes"] == 2 * 64 * 24 * 4 + 4 * 64  # K x C floats read and written, K indices
    assert forward["floor_ms"] == pytest.approx(forward["bytes"] / 1e7)
    for text in (report.table(result), report.contenders(result), report.summary(result)):
        assert "gather_tokens" in text and "match_tokens_window" in text


def test_the_reference_need_not_be_timed(tmp_path):
    arguments = ["--ops", "cross_attention_blocks", "--passes", "fwd"]
    kinds = [{r["kind"] for r in bench(tmp_path, *arguments, *more)[1]["rows"]} for more in ([], ["--no-reference"])]
    assert kinds[0] - kinds[1] <= {"reference"} and kinds[1] == {"ours", "baseline"}


def test_alternatives_on_request_run_where_compilation_is_asked_for():
    names = {
        compiled: {b.name for b in BENCHMARKS["cross_attention_bias"].baselines("cpu", compiled)}
        for compiled in (False, True)
    }
    assert names[True] - names[False] == {"FlexAttention"}
    assert "SDPA, expanded mask" in names[False]


@pytest.mark.parametrize("op", lengths.OPS)
def test_lengths(op, tmp_path, capsys):
    arguments = ["--op", op, "--lengths", "40", "20", "--heads", "2", "--channels", "4", "--seconds", "0.01"]
    path = tmp_path / "lengths.json"
    assert (
        lengths.main([*arguments, "--device", "cpu", "--passes", "fwd", "bwd", "--limit", "1e-9", "-o", str(path)]) == 0
    )
    result = json.loads(path.read_text())
    assert result["op"] == op and result["complete"]
    # The first length is always compared, and tells that the next would take too long.
    measured = [(r["pass"], r["length"], r["contender"]) for r in result["rows"]]
    assert measured == [
        (which, *row) for which in ("fwd", "bwd") for row in ((20, "ours"), (20, "softmax"), (40, "ours"))
    ]
    assert all(row["median_ms"] >= row["best_ms"] > 0 and row["peak_bytes"] >= 0 for row in result["rows"])
    text = report.summary(result)
    assert text in capsys.readouterr().out and op in text and "- bwd: faster" in text


def test_lengths_without_softmax_attention_that_fails(monkeypatch, capsys):
    def too_large(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(lengths, "softmax", too_large)
    arguments = ["--lengths", "20", "--heads", "1", "--channels", "4", "--seconds", "0.01", "--passes", "fwd"]
    assert lengths.main([*arguments, "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "fwd of 20 tokens, softmax: out of memory" in captured.err
    assert "- fwd: faster: not compared" in captured.out


def test_softmax_attention_of_frames_is_masked_softmax_attention():
    x = {name: torch.randn(1, 11, 2, 4) for name in "qkv"}
    frame = torch.arange(11) // 4
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame)
    actual = lengths.softmax("linear_attention_frames", x, {"L": 11, "frame": 4})
    torch.testing.assert_close(actual.transpose(1, 2), expected)


def test_break_even_between_lengths():
    def found(ours, softmax):
        times = {"ours": ours, "softmax": softmax}
        rows = [{"length": 10**i, "contender": name, "ms": ms} for name in times for i, ms in enumerate(times[name], 1)]
        return lengths.crossing(rows, "ms")

    # Twice as slow at 10 tokens and twice as fast at 100: even half way between the logarithms.
    assert found([2, 2], [1, 4]) == {"length": 32, "says": "from 32 tokens"}
    assert found([2, 2, 2], [1, 4, 1]) == {"length": None, "says": "not up to 1,000 tokens"}
    assert found([1, 1], [2, 3]) == {"length": 10, "says": "at all lengths, from 10 tokens"}
    assert found([2, 2, 2], [1, 4])["length"] == 32  # softmax attention left out of the longest
    assert found([1], [])["says"] == "not compared"


def test_peak_memory_of_a_call_on_the_cpu():
    held = timing.CpuClock().peak_bytes(lambda: lambda: torch.ones(16 << 20).sum())
    assert 60 << 20 <= held < 80 << 20


def test_every_benchmark_is_verified_at_its_smoke_shape():
    device = torch.device("cpu")
    rates = timing.Rates(1e10, dict.fromkeys(registry.DTYPES, 1e11))
    runner = measure.Runner(timing.CpuClock(), device, rates, ["auto"], 0.0)
    for entry in BENCHMARKS.values():
        for dtype, passes in (("float32", ("fwd", "bwd")), ("bfloat16", ("fwd",))):
            rows = list(runner.measure(entry, "smoke", dtype, [p for p in passes if p in entry.passes]))
            assert [r["reason"] for r in rows if r["status"] != "ok"] == [], entry.name
            assert {r["kind"] for r in rows} >= {"ours", "baseline"}, entry.name


def test_every_public_op_has_a_benchmark():
    lacking = public_functions() - {b.covers for b in BENCHMARKS.values()}
    assert not lacking, f"benchmarks/cases/<family>.py: no benchmark covers {', '.join(lacking)}"
    for entry in BENCHMARKS.values():
        assert all(any(d in shape.devices for shape in entry.shapes.values()) for d in ("cpu", "cuda")), entry.name


def test_bad_baselines_have_no_speed_and_lose_nothing_of_the_others(tmp_path, entry):
    code, result = bench(tmp_path, "--ops", "double", "--passes", "fwd")
    assert code == 1
    rows = {r["contender"]: r for r in result["rows"]}
    # The reference is an alternative of its own only where auto takes something else.
    status = {name: row["status"] for name, row in rows.items() if name != "reference"}
    assert rows.get("reference", rows["vidmem (auto)"])["status"] == "ok"
    assert status == {
        "vidmem (auto)": "ok", "add": "ok", "square": "error", "NaN": "error", "raises": "error",
        "unsupported": "skipped", "absent": "skipped",
    }  # fmt: skip
    assert all("median_ms" not in row for row in rows.values() if row["status"] != "ok")
    assert "error" in rows["square"]["reason"] and "no such thing" in rows["raises"]["reason"]
    assert rows["unsupported"]["reason"] == "too large"
    assert rows["absent"]["reason"] == "a_module_that_nobody_has is not installed"
    assert "square: AssertionError" in report.summary(result)


def test_our_wrong_result_has_no_speed(tmp_path, entry):
    type(entry).factor = 2.00001  # far within what a baseline may be off
    for which in ("fwd", "bwd"):
        code, result = bench(tmp_path, "--ops", "double", "--passes", which)
        ours = next(r for r in result["rows"] if r["kind"] == "ours")
        assert code == 1 and ours["status"] == "error" and "over the budget" in ours["reason"]
        assert not {"median_ms", "speedup", "gb_s"} & ours.keys()


def test_a_wrong_plan_is_caught(monkeypatch):
    entry, s = BENCHMARKS["match_tokens"], SHAPES["match_tokens"]["smoke"].sizes
    x = entry.make(s, torch.float32, "cpu", torch.Generator().manual_seed(0))
    expected = verify.expect(entry, x, s, "fwd", torch.float32)
    source, destination = entry.tome(x, s)
    verify.check_baseline(entry, (source, destination), expected, x, s, "fwd", torch.float32)
    with pytest.raises(AssertionError, match="error"):
        verify.check_baseline(entry, (source, destination.roll(1)), expected, x, s, "fwd", torch.float32)
    with pytest.raises(AssertionError, match="source and destination"):
        verify.check_baseline(entry, (source, source.roll(1)), expected, x, s, "fwd", torch.float32)


def test_an_explicit_backend_that_cannot_is_skipped(tmp_path):
    code, result = bench(tmp_path, "--ops", "gather_tokens", "--passes", "fwd", "--backend", "cuda", "reference")
    rows = {r["contender"]: r for r in result["rows"]}
    assert code == 0
    assert rows["vidmem (cuda)"]["status"] == "skipped" and "needs cuda tensors" in rows["vidmem (cuda)"]["reason"]
    assert rows["vidmem (reference)"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "gather_token"], r"--ops: must be one of .*gather_tokens, .* \(did you mean gather_tokens\?\)"),
        (["--ops", "gather_tokens", "--shapes", "clip480p"], "--shapes: must be one of smoke, memory20s, history20s"),
        (["--dtypes", "bf16"], "--dtypes: must be one of float32, bfloat16, float16, got bf16"),
        (["--passes", "backward"], "--passes: must be one of fwd, bwd"),
        (["--backend", "tritn"], "--backend: must be one of .*did you mean triton"),
        (["--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--device", "gpu"], "gpu"),
    ],
)
def test_names_that_do_not_exist(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.parse(arguments)
    import re

    assert re.search(message, capsys.readouterr().err)


def test_interrupt_keeps_the_rows(tmp_path, monkeypatch):
    measured = measure.Runner.measure

    def stops_at_the_second(self, entry, *arguments):
        if entry.name == "quantize_rows":
            raise KeyboardInterrupt
        yield from measured(self, entry, *arguments)

    monkeypatch.setattr(measure.Runner, "measure", stops_at_the_second)
    code, result = bench(tmp_path, "--ops", "gather_tokens", "quantize_rows", "--passes", "fwd")
    assert code == 130 and not result["complete"]
    assert {r["op"] for r in result["rows"]} == {"gather_tokens"}
    assert os.listdir(tmp_path) == ["result.json"]


def test_time_limit_names_what_was_not_begun(tmp_path):
    code, result = bench(tmp_path, "--ops", "quantize_rows", "--time-limit", "0")
    assert code == 0 and not result["complete"]
    assert result["not_begun"] == ["quantize_rows smoke float32"] and result["rows"] == []
    assert "not begun" in report.summary(result)


def test_rounds_interleave_and_a_failure_drops_out():
    called = []

    class Clock:
        def time(self, call):
            return call()

    def contender(name, seconds, fail_at=None):
        def call():
            called.append(name)
            if fail_at is not None and called.count(name) > fail_at:
                raise RuntimeError("broke")
            return seconds

        return lambda copy: call

    contenders = {"a": contender("a", 1.0), "b": contender("b", 3.0), "c": contender("c", 1.0, fail_at=2)}
    seconds, errors = timing.interleave(Clock(), contenders, 1, budget=0.0)
    assert seconds == {"a": [1.0] * 3, "b": [3.0] * 3} and errors == {"c": "RuntimeError: broke"}
    assert called[:9] == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]  # one warm-up, then the order shifts
    # Twice as slow a machine in one round changes no ratio.
    assert timing.speedup([1.0, 2.0, 1.0], [3.0, 6.0, 3.0]) == 3.0
    assert timing.summarise([0.001, 0.002, 0.003, 0.004, 0.005, 0.006]) == pytest.approx((3.5, 2.0, 5.0, 1.0))


def test_commit_is_told_outside_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("VIDMEM_COMMIT", raising=False)
    result = record.describe(tmp_path, torch.device("cpu"), [])
    assert result["commit"] == "unknown" and result["dirty"] is None
    path = record.result_path(None, tmp_path, result)
    assert path.parent.parent == tmp_path / "benchmarks" / "results" and path.parent.name.startswith("cpu-")
    assert path.name.endswith("-unknown.json")
    (tmp_path / "COMMIT").write_text("0123456789abcdef\n")
    assert record.describe(tmp_path, torch.device("cpu"), [])["commit"] == "0123456789"
    monkeypatch.setenv("VIDMEM_COMMIT", "fedcba9876543210")
    assert record.describe(tmp_path, torch.device("cpu"), [])["commit"] == "fedcba9876"
