"""Which GPU a kernel passed its tests on: the records, the fingerprints of sources, and where both are shown."""

from __future__ import annotations

import json
import re
import shutil
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from vidmem_kernels import _extension, _verified, info
from vidmem_kernels._op import OPS

RECORDS = sorted((ROOT / "vidmem_kernels" / "verified").glob("*.json"))
TRITON = sorted(name for name, op in OPS.items() if op.triton)


def fingerprint(name, package=_verified.PACKAGE):
    op = OPS[name]
    return _verified.triton_fingerprint(op.family.rpartition(".")[2], op.triton, package)


@pytest.fixture
def package(tmp_path):
    """A copy of the package's sources, to be edited."""
    copy = tmp_path / "vidmem_kernels"
    shutil.copytree(_verified.PACKAGE, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return copy


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_records_are_of_ops_that_there_are(path):
    record = json.loads(path.read_text())
    assert record.keys() == {"device", "commit", "date", "suite", "versions", "kernels"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", record["date"]) and re.fullmatch(r"[0-9a-f]{7}", record["commit"])
    for op, backends in record["kernels"].items():
        assert op in OPS and backends.keys() <= {"triton", "cuda"}
        assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in backends.values())


def test_only_the_ops_whose_file_changed_count_as_changed(package):
    before = {name: fingerprint(name, package) for name in TRITON}
    assert before == {name: fingerprint(name) for name in TRITON}
    file = package / "sparse_gather" / "triton_gather.py"
    file.write_text(file.read_text().replace("tl.load(", "tl.load( ", 1) + "\n# a comment\n")
    assert before == {name: fingerprint(name, package) for name in TRITON}
    file.write_text(file.read_text() + "\nTILE = 5\n")
    changed = {name for name in TRITON if fingerprint(name, package) != before[name]}
    users = {path.stem for path in file.parent.glob("triton_*.py") if "from .triton_gather import" in path.read_text()}
    assert users and changed == {name for name in TRITON if OPS[name].triton in users | {"triton_gather"}}


def test_a_change_of_what_kernels_share_counts_for_all_that_import_it(package):
    before = {name: fingerprint(name, package) for name in TRITON}
    shared = package / "_triton_tiles.py"
    shared.write_text(shared.read_text() + "\nTILE = 5\n")
    users = {path for path in package.rglob("*triton_*.py") if "_triton_tiles import" in path.read_text()}
    changed = {name for name in TRITON if fingerprint(name, package) != before[name]}
    assert users and {"gather_tokens", "merge_tokens"} <= changed


CODE = '''"""{doc}"""

def f(x):
    """{doc}"""
    if x:{comment}
        return f"{{x}} {doc}"
    return "{doc}"
'''


@given(doc=st.text("abc #", max_size=8), comment=st.text("xyz ", max_size=8))
def test_comments_and_docstrings_change_no_fingerprint(doc, comment):
    plain = _verified._python_code(CODE.format(doc="", comment="").replace('return ""', f'return "{doc}"'))
    with_words = CODE.format(doc=doc, comment=f"  # {comment}\n\n")
    rest = with_words.replace(f'f"{{x}} {doc}"', 'f"{x} "')
    assert _verified._python_code(rest) == plain


@given(st.sampled_from(["x", "not x", "x + 1"]), st.sampled_from(["x", "not x", "x + 1"]), st.booleans())
def test_code_changes_the_fingerprint(one, other, indented):
    texts = [f"if {one}:\n    y = 1\nz = {one}\n", f"if {one}:\n    y = 1\n{'    ' * indented}z = {other}\n"]
    same = one == other and not indented
    assert (_verified._python_code(texts[0]) == _verified._python_code(texts[1])) == same


def test_cuda_fingerprints_are_those_of_the_sources(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    before = _verified.cuda_fingerprints(csrc)
    assert before.keys() >= {"gather_tokens", "scatter_add_tokens", "select_tokens"}
    if _extension.module is not None:
        assert before == {op: _extension.cuda_fingerprint(op) for op in before}
    header = csrc / "cuda" / "select_tokens.cuh"
    header.write_text("// another comment\n" + header.read_text())
    assert _verified.cuda_fingerprints(csrc) == before
    header.write_text(header.read_text() + "\nconstexpr int kMore = 1;\n")
    after = _verified.cuda_fingerprints(csrc)
    assert {op for op in before if before[op] != after[op]} == {"select_tokens"}


@pytest.fixture
def records(monkeypatch):
    def have(*runs):
        made = [
            {"device": device, "commit": "abcdef0", "date": date, "suite": "s", "kernels": {"op": {"triton": mark}}}
            for device, date, mark in runs
        ]
        monkeypatch.setattr(_verified, "_records", lambda: made)

    return have


def test_the_last_run_of_the_present_sources_counts(records):
    records(("A", "2026-01-01", "now"), ("B", "2026-01-02", "now"), ("C", "2026-01-03", "older"))
    found = _verified.verified_on("op", "triton", "now")
    assert (found.device, found.current, str(found)) == ("B", True, "B, 2026-01-02 (abcdef0)")


def test_a_changed_kernel_goes_stale_by_itself(records):
    records(("A", "2026-01-01", "first"), ("B", "2026-01-02", "second"))
    found = _verified.verified_on("op", "triton", "now")
    assert (found.device, found.current) == ("B", False) and str(found).startswith("compiled, not run")
    assert _verified.verified_on("op", "cuda", "now") is None
    assert not _verified.verified_on("op", "triton", None).current


def test_info_tells_of_every_kernel_for_gpus():
    told = info.collect()["verified_on"]
    assert {name for name in told if "triton" in told[name]} == set(TRITON)
    text = " ".join(info.render(info.collect()).split())
    part = text[text.index("Kernels for GPUs") :]
    for name, backends in told.items():
        for backend in backends:
            assert f"{name} ({backend})" in part


REPORT = """<testsuites><testsuite tests="6" skipped="1" failures="1" errors="0">
<testcase name="test_backends_agree_with_reference[cuda-gather_tokens-float32]"/>
<testcase name="test_backends_agree_with_reference[cuda-gather_tokens-bfloat16]"/>
<testcase name="test_backends_agree_with_reference[cuda-topk_blocks-float32]"/>
<testcase name="test_backends_agree_with_reference[cuda-topk_blocks-float16]"><failure/></testcase>
<testcase name="test_backends_agree_with_reference[cuda-select_tokens-float16]"><skipped/></testcase>
<testcase name="test_backends_agree_with_reference[cpu-merge_tokens-float16]"/>
</testsuite></testsuites>"""


def test_a_record_holds_what_passed_at_every_dtype(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import verified

    where = {
        "device": {"name": "GPU"},
        "commit": "0123456789",
        "date": "2026-01-02T03:04:05Z",
        "versions": {"torch": "2", "triton": "3", "cuda": "13", "python": "3"},
    }
    made = verified.record(ElementTree.fromstring(REPORT), where, lambda op: {"triton": op.name})
    assert made["kernels"] == {"gather_tokens": {"triton": "gather_tokens"}}
    assert (made["commit"], made["date"]) == ("0123456", "2026-01-02")
    assert made["suite"] == "pytest -m gpu: 4 passed, 1 skipped, 1 failed"
    assert made["versions"] == {"torch": "2", "triton": "3", "cuda": "13"}
