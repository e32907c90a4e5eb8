"""gpu_suite.sh without a GPU: its parts, their seconds, what it leaves in its folder, what it refuses."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.suite import __main__ as suite  # noqa: E402
from benchmarks.suite import outbox, parts, process, sanitize, wheels  # noqa: E402

SCRIPT = ROOT / "benchmarks" / "gpu_suite.sh"


def gpu_suite(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=cwd, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def signals():
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def steps(monkeypatch):
    """Instead of running Python, parts write the files that the test names and end as it says."""
    done = {}

    def python(self, *arguments, output=None, **options):
        told = next((done[key] for key in done if any(str(a).endswith(key) for a in arguments)), (0, {}))
        self.log.open("a").write(f"ran {' '.join(map(str, arguments))} {options.get('environment')}\n")
        if output is not None:
            output.write_text("{}")
        for name, text in told[1].items():
            (self.out / name).write_text(text)
        if isinstance(told[0], BaseException):
            raise told[0]
        return told[0]

    monkeypatch.setattr(parts.Context, "python", python)
    return done


# --- the command ---


def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = gpu_suite("out", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == "no CUDA GPU: nothing measured"
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT is missing: the folder for what is found"),
        (["out", "build", "benches"], f"PARTS: must be of {', '.join(parts.PARTS)}, got benches"),
        (["out", "--seconds", "0"], "--seconds: must be at least 1, got 0"),
        (["out", "--seconds", "inf"], "--seconds: must be at least 1, got inf"),
        (["out", "--seconds", "nan"], "--seconds: must be at least 1, got nan"),
        (["out", "--seconds", "ten"], "argument --seconds: invalid float value: 'ten'"),
        (["out", "bench", "--device", "gpu"], "--device: must be cuda or cpu, got gpu"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_clear_error(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.parse(arguments)
    assert capsys.readouterr().err.splitlines()[-1] == f"gpu_suite.sh: error: {message}"


def test_parts_may_stand_anywhere():
    args = suite.parse(["o", "--seconds", "60", "tune", "--device", "cpu", "train", "tune"])
    assert args.parts == ["tune", "train"] and args.seconds == 60
    assert suite.parse(["o"]).parts == ["build", "tests", "bench"]


def test_a_run_of_the_default_parts_takes_at_most_eight_minutes():
    assert sum(parts.PARTS[name].seconds for name in parts.DEFAULT) + parts.WHEELS_SECONDS <= 480
    assert all(part.seconds <= 240 for part in parts.PARTS.values())
    assert all(len(part.results) < suite.RESULTS_OF_A_PART for part in parts.PARTS.values())


def test_a_part_that_fails_loses_nothing_of_the_others(tmp_path, steps, capsys):
    steps |= {"setup.py": (1, {}), "pytest": (124, {}), "benchmarks.suite.bench": (0, {"bench.json": "[]"})}
    steps["lengths.py"] = (0, {"lengths.json": "{}"})
    steps["vidmem_model"] = (9, {})
    tmp_path.joinpath("bench.json").write_text("of before")
    code = suite.main([str(tmp_path), "build", "tests", "profile", "sanitize", "--device", "cpu"])
    assert code == 1
    told = json.loads((tmp_path / "summary.json").read_text())
    assert told["passed"] is False
    assert {p["part"]: (p["status"], p["exit_code"], p["results"]) for p in told["parts"]} == {
        "build": ("failed", 1, ["info.json"]),
        "tests": ("out of time", 124, []),
        "profile": ("failed", 9, ["lengths.json"]),
        "sanitize": ("left out", -1, []),
    }
    out = capsys.readouterr().out
    assert "--- last lines of build.log\nran setup.py" in out
    assert "sanitize  left out" in out and "needs a GPU" in out
    assert tmp_path.joinpath("bench.json").read_text() == "of before"
    assert len(os.listdir(tmp_path)) <= outbox.MOST_FILES


def test_a_part_begins_with_none_of_its_own_results_of_before(tmp_path, steps):
    for name in ("info.json", "build.log", "verified.json"):
        (tmp_path / name).write_text("of before")
    steps["vidmem_kernels.info"] = (1, {})
    steps["setup.py"] = (KeyboardInterrupt(), {})
    assert suite.main([str(tmp_path), "build", "tests", "--device", "cpu"]) == 130
    assert not (tmp_path / "info.json").exists() and "of before" not in (tmp_path / "build.log").read_text()
    assert (tmp_path / "verified.json").exists()
    told = json.loads((tmp_path / "summary.json").read_text())
    assert [(p["part"], p["status"]) for p in told["parts"]] == [("build", "interrupted")] and not told["passed"]


def test_training_goes_on_from_what_it_left(tmp_path, monkeypatch):
    """Also where other parts' files have sent its weights into the archive."""
    left = {"train.json": "{}", **{f"weights.{i}": str(i) for i in range(6)}}
    for name in left:
        (tmp_path / name).write_text(left[name])
    for i in range(5):
        (tmp_path / f"{i}.json").write_text("")
    outbox.pack(tmp_path)
    seen = {}

    def run(command, seconds, log, **options):
        seen.update({name: (tmp_path / name).read_text() for name in left}, command=command)
        return 0

    monkeypatch.setattr(parts, "run", run)
    monkeypatch.setattr(parts.Path, "is_file", lambda self: self.name == "gpu_train.sh" or os.path.isfile(self))
    assert suite.main([str(tmp_path), "train", "--device", "cpu", "--seconds", "240"]) == 0
    assert seen.pop("command")[:4] == ["benchmarks/gpu_train.sh", str(tmp_path), "--minutes", "3.50"] and seen == left
    assert len(os.listdir(tmp_path)) <= outbox.MOST_FILES


@pytest.mark.parametrize("has_xdist", [True, False])
def test_tests_run_in_parallel_where_they_can(has_xdist, tmp_path, steps, monkeypatch):
    monkeypatch.setattr(
        parts.importlib.util, "find_spec", lambda name: object() if has_xdist or name == "torch" else None
    )
    assert suite.main([str(tmp_path), "tests", "--device", "cpu"]) == 0
    log = (tmp_path / "tests.log").read_text()
    assert "ran -m pytest -m not gpu" in log and "'OMP_NUM_THREADS': '1'" in log
    assert (f" -n {len(os.sched_getaffinity(0))} tests/tools/test_install.py" in log) == has_xdist
    note = json.loads((tmp_path / "summary.json").read_text())["parts"][0]["note"]
    assert ("pytest-xdist is missing" in note) != has_xdist


def test_without_torch_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    assert suite.main([str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"{sys.executable} cannot import torch: nothing measured\n"


@pytest.mark.long
def test_a_dry_run_of_every_part(tmp_path):
    done = gpu_suite("out", "bench", "profile", "sanitize", "--device", "cpu", "--seconds", "100", cwd=tmp_path)
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    status = {p["part"]: p["status"] for p in told["parts"]}
    assert status == {"bench": "passed", "profile": "passed", "sanitize": "left out"}, done.stdout
    assert done.returncode == 0 and "| op " in done.stdout
    outbox.unpack(tmp_path / "out")
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert result["complete"] and {row["status"] for row in result["rows"]} == {"ok"}
    assert result["rates"]["copy_gb_s"] > 0
    assert {"profile.json", "lengths.json", "bench.log"} <= set(os.listdir(tmp_path / "out"))


@pytest.mark.long
def test_a_dry_run_of_tuning(tmp_path):
    pytest.importorskip("vidmem_kernels.sparse_gather.triton_gather")
    from vidmem_kernels._tuned import TUNABLES

    if not any("gather" in kernel for kernel in TUNABLES):
        pytest.skip("gather_tokens has no tiles to choose")
    done = gpu_suite("out", "tune", "--device", "cpu", "--seconds", "100", cwd=tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "out" / "tuned.json").read_text()), done.stdout


# --- seconds ---


def test_a_command_that_hangs_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    log = tmp_path / "log"
    start = time.monotonic()
    script = "sleep 313.132 & trap 'echo asked' TERM; while true; do sleep 0.05; done"
    assert process.run(["bash", "-c", script], 1.5, log) == process.OUT_OF_TIME
    assert time.monotonic() - start < 10 and "asked" in log.read_text()
    time.sleep(0.2)
    assert "sleep 313.132" not in subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True).stdout


def test_commands_tell_how_they_ended(tmp_path):
    log, output = tmp_path / "log", tmp_path / "output"
    assert process.run(["bash", "-c", "echo out; echo err >&2; exit 7"], 30, log, output=output) == 7
    assert log.read_text() == "err\n" and output.read_text() == "out\n"
    assert process.run(["bash", "-c", 'echo "$A"; kill -9 $$'], 30, log, environment={"A": "b"}) == 137
    assert process.run(["no-such-program-at-all"], 30, log) == 127
    assert log.read_text().startswith("err\nb\nno-such-program-at-all: ")


def test_an_interrupt_asks_the_command_to_end(tmp_path):
    log = tmp_path / "log"
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    script = "trap 'echo kept; exit' TERM; while true; do sleep 0.05; done"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            process.run(["bash", "-c", script], 60, log)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "kept" in log.read_text()


# --- what is left ---


def draw_files(draw, folder, most):
    """Files of drawn names and sizes, by name."""
    names = ["summary.json", "bench.json", "build.log", "train.json", "tests.log"]
    names += [f"weights.{i:02d}" for i in range(draw.randint(0, 6))] + [f"{i}.json" for i in range(draw.randint(0, 5))]
    names += [f"deep/{i}/x" for i in range(draw.randint(0, 2))]
    made = {name: draw.randbytes(draw.randint(1, most * 2 if draw.random() < 0.1 else most // 2)) for name in names}
    for name, content in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return made


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("seed", range(20))
def test_few_small_files_are_left_and_nothing_is_lost_that_fits(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "MOST_BYTES", 64_000)
    draw = random.Random(seed)
    made = draw_files(draw, tmp_path, 64_000)
    (tmp_path / ".bench.json.x1").write_text("was being written")
    spare = draw.choice([0, 3])
    lost = outbox.pack(tmp_path, spare)
    left = everything(tmp_path)
    assert len(left) <= 8 - spare and max(map(len, left.values())) <= 64_000
    assert all("/" not in name for name in left) and ("summary.json" in left or len(made["summary.json"]) > 64_000)
    lost += outbox.pack(tmp_path)  # again, with more room
    assert len(everything(tmp_path)) <= 8
    outbox.unpack(tmp_path)
    assert everything(tmp_path) == {name: content for name, content in made.items() if name not in lost}
    assert lost == [] or sum(map(len, made.values())) > (6 - spare) * 64_000


def test_few_files_stay_as_they_are(tmp_path):
    for name in ("summary.json", "a.log"):
        (tmp_path / name).write_text("x")
    assert outbox.pack(tmp_path) == [] and sorted(os.listdir(tmp_path)) == ["a.log", "summary.json"]


def test_what_lies_open_is_newer_than_what_is_archived(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.log").write_text("old")
    outbox.pack(tmp_path)
    assert outbox.ARCHIVE in os.listdir(tmp_path)
    (tmp_path / "11.log").write_text("new")
    outbox.unpack(tmp_path)
    assert {path.read_text() for path in tmp_path.glob("0*.log")} == {"old"}
    assert (tmp_path / "11.log").read_text() == "new"


def test_an_archive_that_was_not_finished_harms_nothing(tmp_path):
    for i in range(12):
        (tmp_path / f"{i:02d}.log").write_text(str(i))
    before = everything(tmp_path)
    outbox.pack(tmp_path)
    whole = (tmp_path / outbox.ARCHIVE).read_bytes()
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / outbox.ARCHIVE).write_bytes(whole[: len(whole) // 2])
    outbox.unpack(tmp_path)
    assert everything(tmp_path) == before


# --- wheels ---


def test_wheels_that_do_not_fit_keep_no_others_out(tmp_path, monkeypatch):
    python = tmp_path / "python"
    log = tmp_path / "log"
    python.write_text(
        f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *bad*) printf "a hint\\nERROR: bad wheel\\n" >&2; exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(python))
    names = ["einops-0.8.2-py3-none-any.whl", "bad-1.0-py3-none-any.whl", "fla_core-0.6.0-py3-none-any.whl"]
    for name in names:
        (tmp_path / name).write_text("")
    found = wheels.install(tmp_path, 30)
    assert sorted(found["installed"]) == [names[0], names[2]] and found["failed"] == {names[1]: "ERROR: bad wheel"}
    assert not {"einops==0.8.2", "fla-core==0.6.0"} & set(found["missing"]) and "fa3-fwd==0.0.3" in found["missing"]
    assert log.read_text().count("--no-index --no-deps") == 3
    made = suite.Suite(tmp_path, "cpu", None)
    made.more["wheels"] = found
    assert "wheel bad-1.0-py3-none-any.whl: ERROR: bad wheel" in made.table()


def test_the_list_of_wheels_names_what_is_measured_against():
    versions = wheels.wanted()
    assert versions["fa3-fwd"] == "0.0.3" and versions["fla-core"] == versions["flash-linear-attention"] == "0.6.0"
    assert {"flash-attn-4", "nvidia-cutlass-dsl"} <= versions.keys()
    assert "--platform manylinux_2_24_x86_64" in wheels.LIST.read_text()


# --- the sanitizer ---


def test_what_the_sanitizer_says():
    clean = "2 passed in 3 s\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.outcome(0, clean) == {"status": "clean", "passed": 2}
    assert sanitize.outcome(99, clean.replace("0 errors", "3 errors")) == {"status": "faults", "faults": 3}
    hazards = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    assert sanitize.outcome(0, hazards) == {"status": "faults", "faults": 2}
    assert sanitize.outcome(5, "5 deselected") == {"status": "nothing ran", "exit_code": 5}
    assert sanitize.outcome(1, "1 failed") == {"status": "tests failed", "exit_code": 1}
    assert sanitize.outcome(124, "") == {"status": "out of time"}


def test_the_sanitizer_watches_its_selection_and_names_what_is_left_out(tmp_path, monkeypatch):
    asked = []

    def run(command, seconds, log, **options):
        asked.append(command)
        log.open("a").write("1 passed\n" if "cuda-gather_tokens-" in str(command) else "ERROR SUMMARY: 4 errors\n")
        return 0

    monkeypatch.setattr(sanitize, "run", run)
    monkeypatch.setattr(sanitize, "SELECTION", {"memcheck": ("gather_tokens", "topk_blocks"), "racecheck": ()})
    path, log = tmp_path / "sanitize.json", tmp_path / "log"
    assert sanitize.check("tool", path, log, 100) == 1
    result = json.loads(path.read_text())
    assert [(r["op"], r["status"]) for r in result["runs"]] == [("gather_tokens", "clean"), ("topk_blocks", "faults")]
    assert asked[0][:3] == ["tool", "--tool", "memcheck"]
    assert sanitize.check("tool", path, log, 1) == 0
    assert json.loads(path.read_text())["left_out"] == ["memcheck gather_tokens", "memcheck topk_blocks"]


def test_ops_of_the_sanitizer_exist():
    from vidmem_kernels._op import OPS

    assert {op for ops in sanitize.SELECTION.values() for op in ops} <= OPS.keys()
    assert "def test_backends_agree_with_reference" in (ROOT / sanitize.TESTS).read_text()
    assert sanitize.find() is None or os.access(sanitize.find(), os.X_OK)
