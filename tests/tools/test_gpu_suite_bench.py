"""The suite's part bench: what it calls the same path, where time goes, and what hangs, fails or is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from paths import HELPERS, ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import cases, registry, report, shapes  # noqa: E402
from benchmarks.registry import BENCHMARKS  # noqa: E402
from benchmarks.suite import bench, breakdown, launches, schedule  # noqa: E402
from benchmarks.suite.pool import Pool  # noqa: E402
from benchmarks.suite.row import Session  # noqa: E402
from benchmarks.suite.schedule import BASELINE, DETAIL, OURS, Row  # noqa: E402
from benchmarks.targets import TARGETS  # noqa: E402
from benchmarks.timing import Rates  # noqa: E402

CASES = HELPERS / "suite_cases.py"


# --- where results are verified ---


def test_smaller_sizes_are_the_same_task():
    draw = random.Random(0)
    for _ in range(200):
        most, heads = draw.choice(shapes.VERIFIED_AT)
        n = draw.randint(1, 700_000)
        small = shapes.smaller({"N": n, "C": 128, "keep": n // 4, "H": draw.randint(1, 24)}, most, heads)
        assert small["C"] == 128 and small["N"] % 4096 == n % 4096 and small["N"] < most + 4096
        assert small["N"] == n or n > most
        assert abs(small["keep"] - small["N"] / 4) <= 1 and small["H"] <= heads
        grid = tuple(draw.randint(1, 60) for _ in range(3))
        small = shapes.smaller({"N": 0, "C": 16, "grid": grid}, most, heads)
        assert small["grid"][1:] == grid[1:] and small["grid"][0] % 8 == grid[0] % 8 or small["grid"] == grid
        assert small["N"] == small["grid"][0] * grid[1] * grid[2]
    for entry in BENCHMARKS.values():
        for shape in entry.shapes.values():
            found = list(entry.verified_at(shape.sizes))
            assert found[-1] == shape.sizes and all(small.keys() == shape.sizes.keys() for small in found)
            assert all(s.get("topk", 0) <= -(-s.get("Lk", 1) // s.get("block", (1, 1))[1]) for s in found), entry.name


def recorded(op, x, s):
    with launches.recording() as found, torch.no_grad():
        BENCHMARKS[op].call(x, s, "triton")
    return launches.path_of([], found)


def made(op, s):
    return BENCHMARKS[op].make(s, torch.float32, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="hands CPU tensors to Triton's interpreter")
def test_the_path_is_the_kernels_and_what_they_are_compiled_for():
    pytest.importorskip("triton")
    full, alike, odd, wide = (
        recorded("gather_tokens", made("gather_tokens", s), s)
        for s in (
            {"M": 100, "C": 24, "K": 198},
            {"M": 52, "C": 24, "K": 134},
            {"M": 64, "C": 24, "K": 134},
            {"M": 52, "C": 40, "K": 134},
        )
    )
    assert full.launches and launches.differences(full, alike) == []
    assert any("multiple of 16" in text for text in launches.differences(full, odd))
    assert launches.differences(full, wide)
    assert full.kernels() == alike.kernels() and all(isinstance(name, str) for name in full.kernels())


@pytest.mark.skipif(torch.cuda.is_available(), reason="hands CPU tensors to Triton's interpreter")
@pytest.mark.parametrize(
    ("op", "which"),
    [
        ("match_tokens", "fwd"),
        ("match_tokens_window", "fwd"),
        *(("cross_attention_bias", which) for which in ("fwd", "bwd")),
        *(pytest.param("cross_attention_window", which, marks=pytest.mark.long) for which in ("fwd", "bwd")),
        *(pytest.param("cross_attention_blocks", which, marks=pytest.mark.long) for which in ("fwd", "bwd")),
        pytest.param("gather_tokens", "fwd", marks=pytest.mark.long),
    ],
)
def test_targets_that_take_long_to_verify_take_the_same_path_at_a_smaller_shape(op, which, monkeypatch):
    """At the true shapes and as on Hopper: every launch is recorded and none is run, so that nothing is computed."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from vidmem_kernels import _tuned

    def zeros(rng, dtype, *shape):  # pages that nobody writes take no memory
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", lambda self, *args, grid, warmup, **options: None)
    monkeypatch.setattr(_tuned, "arch_of", lambda device: 90)
    for module in (cases.sparse_gather, cases.token_merge, cases.cross_attn):
        monkeypatch.setattr(module, "randn", zeros)
    monkeypatch.setattr(registry, "randn", zeros)
    for name in ("_window_mask", "_block_mask"):
        monkeypatch.setattr(cases.cross_attn, name, lambda *unused: None)
    (target,) = (t for t in TARGETS if (t.op, t.which) == (op, which))
    entry = BENCHMARKS[op]
    full = entry.shapes[target.shape].sizes

    def path(s):
        x = entry.make(s, torch.bfloat16, "cpu", torch.Generator().manual_seed(0))
        function = lambda inputs: entry.call(inputs, s, "triton")  # noqa: E731
        call = registry.prepare(function, x, which, entry.differentiable, torch.bfloat16)
        with launches.recording() as found, torch.autograd.set_multithreading_enabled(False):
            call()
        return launches.path_of([], found)

    expected, tried = path(full), {}
    assert expected.launches
    for s in entry.verified_at(full):
        assert s != full, tried
        tried[str(s)] = launches.differences(expected, path(s))
        if not tried[str(s)]:
            break


def test_what_follows_from_the_shape_makes_another_path():
    def kernel(x, n, EVEN: "tl.constexpr", BLOCK: "tl.constexpr"):  # noqa: F821
        pass

    def path(n, block=16, count=1, warps=4, programs=None, even=None, unspecialised=()):
        grid = (programs or -(-n // block),)
        options = {"EVEN": n % block == 0 if even is None else even, "BLOCK": block, "num_warps": warps}
        launch = launches.launch_of(kernel, (torch.zeros(n), n), options, grid, unspecialised)
        return launches.path_of([], [launch] * count)

    assert launches.differences(path(1000), path(104)) == []
    assert launches.differences(path(1000, count=5), path(104, count=2)) == []
    assert "n any, at the small one multiple of 16" in launches.differences(path(1000), path(96, even=False))[0]
    assert launches.differences(*(path(n, even=False, unspecialised=("n",)) for n in (1000, 96))) == []
    for other, told in [
        (path(96), "EVEN False, at the small one True"),
        (path(104, block=32), "BLOCK 16, at the small one 32"),
        (path(104, count=2), "launches once, at the small one many"),
        (path(104, warps=8), "num_warps 4, at the small one 8"),
        (path(104, programs=1), "grid ('many',), at the small one (1,)"),
    ]:
        assert told in launches.differences(path(1000), other)[0]
    choices = [[SimpleNamespace(op="o", backend=b, library=None)] for b in ("triton", "library")]
    assert launches.differences(*(launches.path_of(c, []) for c in choices))
    assert launches.differences(path(1000), launches.path_of([], [])) == ["kernel at the full shape only"]


def test_a_shape_of_another_path_is_not_verified_instead(monkeypatch):
    """The first sizes differ, the second are refused, the full ones are taken, and all that is told."""
    session = Session("cpu")
    full = {"M": 96, "C": 24, "K": 64}
    sizes = [{**full, "K": 20}, {**full, "K": 21}, full]
    entry = BENCHMARKS["gather_tokens"]
    monkeypatch.setattr(type(entry), "verified_at", lambda self, s: iter(sizes))
    call = Session._call

    def other_path(self, benchmark, contender, x, which, dtype):
        if x["index"].shape[1] == 21:
            raise ValueError("gather_tokens: no")
        results, path, seconds = call(self, benchmark, contender, x, which, dtype)
        return results, path._replace(choices=path.choices | {str(x["index"].shape[1] == 20)}), seconds

    monkeypatch.setattr(Session, "_call", other_path)
    monkeypatch.setitem(shapes.SHAPES["gather_tokens"], "odd", shapes.Shape(full, ""))
    row, rates = Row("gather_tokens", "odd", "float32", "fwd"), Rates(1e10, {"float32": 1e11})
    told = {}
    for found in session.ours(row, rates, 0.0):
        told |= found
    assert told["status"] == "ok" and told["verified_at"] == full
    assert [at["sizes"] for at in told["other_path_at"]] == sizes[:2]
    assert "at one shape only" in told["other_path_at"][0]["differs"][0]
    assert "gather_tokens: no" in told["other_path_at"][1]["differs"][0]


# --- where the time goes ---


def test_the_split_of_a_call_on_the_cpu():
    row = Row("quantize_rows", "smoke", "float32", "fwd")
    (split, _, graph) = Session("cpu").detail(row)
    split = split["split"]
    assert split["by"] == "host" and split["kernels_ms"] > 0 and split["host_ms"] >= 0
    assert split["top"][0][1] >= split["top"][-1][1] > 0
    assert graph["graph"] == {"works": None, "reason": "not measured: no GPU"}


def test_kernels_are_told_apart_by_name():
    part = breakdown._part
    assert part("_gather_kernel", ["_gather_kernel"]) == "kernels_ms"
    assert part("void vidmem::merge_kernel<float>(float*)", []) == "kernels_ms"
    for name in ("void at::native::vectorized_elementwise_kernel<4>", "Memcpy DtoD (Device -> Device)",
                 "void cub::DeviceRadixSortOnesweepKernel<>", "aten::sort", "triton_poi_fused_add_0"):  # fmt: skip
        assert part(name, ["_gather_kernel"]) == "planning_ms"
    for name in ("cudnn_generated_fort_native_sdpa_sm90", "void cutlass::device_kernel<flash::FlashAttnFwdSm90>"):
        assert part(name, ["_gather_kernel"]) == "library_ms"


def test_results_of_a_stream_or_graph_are_compared():
    a = torch.arange(6.0)
    assert breakdown._compared((a, 3), (a.clone(), 3)) == {"works": True, "equal": True}
    near = breakdown._compared([a * (1 + 1e-3)], [a])
    assert near["works"] and not near["equal"] and near["difference"] == pytest.approx(1e-3, rel=0.01)
    assert not breakdown._compared([a + 1], [a])["works"]
    assert not breakdown._compared([a * torch.nan], [a])["works"]
    json.dumps(breakdown._compared([a * torch.nan], [a]), allow_nan=False)


# --- workers ---


@pytest.fixture
def pool():
    with Pool("cpu", [CASES]) as made:
        yield made


@pytest.fixture
def rates(monkeypatch):
    """Of a device, without the seconds that it takes to measure them."""

    def known(self, *unused):
        self.rates = Rates(1e10, {"float32": 1e11})

    monkeypatch.setattr(bench.Bench, "measure_rates", known)


@pytest.fixture
def more_cases():
    """Undoes what `--cases` registers in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    for name in [name for name in BENCHMARKS if name.startswith("suite_")]:
        del BENCHMARKS[name], shapes.SHAPES[name]
    signal.signal(signal.SIGTERM, handler)


def sleepers():
    """What suite_cases.forever has started and still runs."""
    found = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout
    return found.count("sleep 313.131")


def run(tmp_path, *arguments):
    """Exit code and result of a dry run of the part."""
    path = tmp_path / "bench.json"
    options = ["--device", "cpu", "--shape", "smoke", "--round-seconds", "0.01", "--cases", str(CASES)]
    code = bench.main([*options, "-o", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_bad_contenders_lose_nothing_of_the_others(tmp_path, monkeypatch, rates, more_cases, capsys):
    monkeypatch.setattr(schedule, "MOST", {OURS: 30.0, DETAIL: 20.0, BASELINE: 5.0})
    code, result = run(tmp_path, "--seconds", "90", "--ops", "suite_double")
    rows = {row["contender"]: row for row in result["rows"]}
    assert code == 0 and result["complete"], capsys.readouterr().err
    assert {name: row["status"] for name, row in rows.items()} == {
        "vidmem (auto)": "ok",
        "add": "ok",
        "dies": "error",
        "hangs": "hung",
        "raises": "error",
        "square, wrong": "error",
    }
    assert "5 s" in rows["hangs"]["reason"] and "exit code 3" in rows["dies"]["reason"]
    assert "no such thing" in rows["raises"]["reason"] and "error" in rows["square, wrong"]["reason"]
    assert not any("median_ms" in row for row in rows.values() if row["status"] != "ok")
    ours = rows["vidmem (auto)"]
    assert ours["best_baseline"] == "add" and ours["speedup"] == rows["add"]["over_ours"] > 0
    assert ours["verified_at"] == {"M": 40, "C": 8, "K": 30} and ours["path"]["choices"] == [
        f"gather_tokens: {ours['backend']}"
    ]
    assert ours["first_call_ms"] > 0 and ours["split"]["by"] == "host"
    assert sleepers() == 0
    text = report.summary(result)
    assert "hung: suite_double smoke float32 fwd hangs: stopped at its limit" in text


@pytest.mark.long
def test_our_own_call_that_hangs_or_is_wrong(tmp_path, monkeypatch, rates, more_cases):
    monkeypatch.setattr(schedule, "MOST", {OURS: 8.0, DETAIL: 20.0, BASELINE: 20.0})
    monkeypatch.setattr(bench, "WARM_MOST", 5.0)
    code, result = run(tmp_path, "--seconds", "100", "--ops", "suite_hangs", "suite_wrong", "--warm", "2")
    rows = {(row["op"], row["contender"]): row for row in result["rows"]}
    assert code == 1 and sleepers() == 0
    assert rows["suite_hangs", "vidmem (auto)"]["status"] == "hung"
    wrong = rows["suite_wrong", "vidmem (auto)"]
    assert wrong["status"] == "error" and "over the budget" in wrong["reason"] and "median_ms" not in wrong
    # Alternatives are then verified by the reference, and timed alone.
    for op in ("suite_hangs", "suite_wrong"):
        assert rows[op, "add"]["status"] == "ok" and "over_ours" not in rows[op, "add"]
        assert rows[op, "add"]["verified_by"] == "reference in float64"
        assert rows[op, "square, wrong"]["status"] == "error"
    assert {(left["op"], left["reason"]) for left in result["left_out"]} == {
        ("suite_hangs", "ours was not measured"),
        ("suite_wrong", "ours was not measured"),
    }
    assert any("suite_hangs" in fault for fault in result["warm"]["faults"]) and result["warm"]["processes"] == 2


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, rates, more_cases):
    took = bench.Bench.take

    def stops_at_the_second(self, step, limit):
        if self.rows:
            raise KeyboardInterrupt
        took(self, step, limit)

    monkeypatch.setattr(bench.Bench, "take", stops_at_the_second)
    code, result = run(tmp_path, "--seconds", "60", "--ops", "quantize_rows")
    assert code == 130 and not result["complete"]
    assert [(row["contender"], row["status"]) for row in result["rows"]] == [("vidmem (auto)", "ok")]


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch, rates, more_cases):
    monkeypatch.setattr(bench, "plan", lambda steps, seconds, clock: ((step, 0.0) for step in steps))
    code, result = run(tmp_path, "--seconds", "60", "--ops", "quantize_rows")
    assert code == 0 and not result["complete"] and result["rows"] == []
    assert {left["contender"] for left in result["left_out"]} >= {"vidmem (auto)", "amax, divide, round"}
    assert "left out, no time was left: quantize_rows smoke float32 fwd vidmem (auto)" in report.summary(result)


def test_a_contender_that_hung_is_not_asked_at_other_rows(monkeypatch, more_cases, tmp_path):
    monkeypatch.setattr(bench.Bench, "write", lambda self: None)
    with Pool("cpu", []) as made:
        taker = bench.Bench({"rows": [], "left_out": []}, tmp_path / "x.json", made, 0.1)
    rows = [Row("merge_tokens", "smoke", "float32", which) for which in ("fwd", "bwd")]
    taker.hung["merge_tokens", "index_add"] = rows[0]
    for name in ("index_add", "ToMe, scatter_reduce"):
        monkeypatch.setattr(taker, "_baseline", lambda step, limit: taker.rows.setdefault(step, {}))
        taker.take(schedule.Step(BASELINE, rows[1], name, 0.0, 5.0), 5.0)
    assert [left["reason"] for left in taker.result["left_out"]] == ["hung at merge_tokens smoke float32 fwd"]
    assert [step.contender for step in taker.rows] == ["ToMe, scatter_reduce"]


@pytest.mark.long
def test_parallel_workers_do_every_job_within_the_seconds(pool):
    jobs = [
        {"kind": "warm", "row": Row("suite_double", "smoke", "float32", ""), "passes": ["fwd"], "contender": name}
        for name in (None, "add", "raises", "hangs")
    ]
    told = {}
    start = time.monotonic()
    pool.all_at_once(jobs, 2, 60.0, 6.0, lambda job, outcome: told.setdefault(job["contender"], outcome))
    assert {name: outcome.status for name, outcome in told.items()} == {
        None: "ok", "add": "ok", "raises": "error", "hangs": "hung"
    }  # fmt: skip
    assert told[None].said["fwd"] > 0 and time.monotonic() - start < 50 and sleepers() == 0


def test_what_workers_are_forked_from_touches_no_gpu():
    """A process in which the CUDA driver was asked anything leaves forks that cannot use the GPU."""
    code = """
import torch
def asked(*unused): raise SystemExit("the GPU was asked for")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_capability"):
    setattr(torch.cuda, name, asked)
import benchmarks.suite.row
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds: must be above 0, got 0"),
        (["--seconds", "nan"], "--seconds: must be above 0, got nan"),
        (["--ops", "gather_token"], "--ops: must be one of"),
        (["--shape", "smok"], "did you mean smoke?"),
        (["--device", "gpu"], "--device: must be one of cpu, cuda, got gpu"),
        (["--cases", "/nowhere/at_all.py"], "at_all.py"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["-o", "x.json", *arguments])
    assert message in capsys.readouterr().err
