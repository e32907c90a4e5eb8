"""The examples that users copy run and print what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

EXAMPLES = ROOT / "examples"


def lines_of(name):
    command = [sys.executable, str(EXAMPLES / name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_merge_in_block():
    (line,) = lines_of("merge_in_block.py")
    assert line.startswith("720 tokens in, the block saw 360, gradient norm ")
    assert float(line.split()[-1]) > 0


def test_memory_bank():
    (line,) = lines_of("memory_bank.py")
    assert "best row 1234" in line
    assert float(line.split()[-1]) < 0.03  # half a step of a row whose largest value is about 3 to 4


def test_memory_in_wan():
    closed, *steps, loaded, removed = lines_of("memory_in_wan.py")
    assert [float(line.split()[-1]) for line in (closed, loaded, removed)] == [0, 0, 0]
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 3 and losses[2] < 0.1 * losses[0]


def test_stream_attention():
    differences = [float(line.split()[-1]) for line in lines_of("stream_attention.py")]
    assert len(differences) == 2 and all(d < 1e-5 for d in differences)


def test_memory_in_block():
    tokens, closed, *steps = lines_of("memory_in_block.py")
    assert tokens == "480 past tokens, 240 in memory, of 480"
    assert float(closed.split()[-1]) == 0
    losses = [float(line.split()[-1]) for line in steps]
    assert len(losses) == 3 and losses[2] < 0.1 * losses[0]


def test_merge_in_wan():
    pytest.importorskip("diffusers")
    plain, *merged, out = lines_of("merge_in_wan.py")
    assert plain.startswith("Wan as it was: ") and out == "taken out: difference 0.0000"
    assert [line.split(":")[0] for line in merged] == [f"{keys} keys of 1920" for keys in (1536, 1152, 768)]
    differences = [float(line.split()[-1]) for line in merged]
    assert 0 < differences[0] < differences[1] < differences[2] < 0.01


def test_memory_prefix_in_wan():
    pytest.importorskip("diffusers")
    whole, merged, removed = lines_of("memory_prefix_in_wan.py")
    assert whole.startswith("288 memory tokens: ") and float(whole.split()[3]) < 1e-5
    assert merged.startswith("144 memory tokens: ") and 0 < float(merged.split()[3]) < 0.5
    assert float(removed.split()[2]) == 0


def test_sparse_attention_in_wan():
    pytest.importorskip("diffusers")
    dense, sparse, after = lines_of("sparse_attention_in_wan.py")
    assert float(dense.split()[1]) < 1e-5
    assert 0 < float(sparse.split()[4]) < 0.1
    assert float(after.split()[1]) == 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_every_example_is_tested(path):
    assert f'lines_of("{path.name}")' in Path(__file__).read_text()
