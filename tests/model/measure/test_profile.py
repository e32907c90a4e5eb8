"""Peak memory is measured correctly, and so is memory against context length."""

import json
import math

import pytest
import torch

from vidmem_kernels import cross_attention, linear_attention, peak_memory
from vidmem_model import files
from vidmem_model.errors import UserError
from vidmem_model.measure import attention as profile
from vidmem_model.measure import peak as measure
from vidmem_model.measure import repeat
from vidmem_model.measure.attention import STRATEGIES, ProfileConfig, measure_point
from vidmem_model.measure.peak import PeakMemory
from vidmem_model.show import plots as report

MIB = 2**20
SMALL = ProfileConfig(lengths=(1.0, 4.0), heads=2, head_dim=32, grid=(8, 12), dtype="float32")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.02)


def write(mib):
    """A tensor of so many MiB whose pages have been written."""
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_known_allocation():
    with PeakMemory() as memory:
        held = write(256)
    assert memory.method == "VmHWM" or "sampled" in memory.method
    assert memory.grown_bytes == pytest.approx(256 * MIB, rel=0.1)
    del held


def test_peak_that_is_gone_again_and_restart():
    with PeakMemory() as memory:
        spike = write(128)
        del spike
        assert memory.held_bytes() < 2 * MIB
        held = write(32)
        assert memory.held_bytes() == pytest.approx(32 * MIB, rel=0.1)
    assert memory.grown_bytes == pytest.approx(128 * MIB, rel=0.1)
    with PeakMemory() as memory:
        spike = write(128)
        del spike
        memory.restart()
        more = write(16)
    assert memory.grown_bytes == pytest.approx(16 * MIB, rel=0.1)
    del held, more


def test_memory_that_malloc_keeps_is_counted_again():
    """Blocks below malloc's mapping threshold come back from its heap: they must not look free."""
    for _ in range(3):
        with PeakMemory() as memory:
            blocks = [write(1) for _ in range(64)]
        assert memory.grown_bytes == pytest.approx(64 * MIB, rel=0.1)
        del blocks


def test_nested_measurements_do_not_hide_a_peak():
    with PeakMemory() as outer:
        spike = write(128)
        del spike
        with PeakMemory() as inner:
            held = write(16)
    assert inner.grown_bytes == pytest.approx(16 * MIB, rel=0.1)
    assert outer.grown_bytes == pytest.approx(128 * MIB, rel=0.1)
    assert measure.process_peak() >= outer.peak_bytes
    del held


def test_without_the_right_to_reset_the_level_is_sampled(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with PeakMemory() as memory:
        held = write(256)
    assert memory.method == "sampled VmRSS"
    assert memory.grown_bytes == pytest.approx(256 * MIB, rel=0.1)
    del held


def test_counts_of_the_paper():
    """20 s at 24 fps are 187,200 tokens, 5,460 at rate 4x4x2; one second at 16 fps is 195."""
    config = ProfileConfig().on("cuda")
    frames = config.latent_frames(20)
    assert config.held_tokens("whole history", frames) == 187_200
    assert config.compressed_tokens(frames) == 5_460
    assert config.held_tokens("sliding window", frames) == 8 * 1560
    # 7 x 13 = 91 tokens every two latent frames: 182, not 195, as columns 52/4 and rows 30/4 floor.
    sixteen = ProfileConfig(fps=16.0)
    assert sixteen.compressed_tokens(sixteen.latent_frames(1)) == 182
    assert config.held_bytes("whole history", frames) == 2 * 187_200 * 12 * 128 * 2
    assert config.held_bytes("linear attention", frames) == (2 * 1560 * 12 * 128 * 2 + 12 * 128 * 129 * 4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_measured_and_computed_bytes_agree(strategy):
    config = ProfileConfig(heads=16, head_dim=128, grid=(16, 26), dtype="float32")
    point = measure_point(strategy, config, 4.0)
    # The level resolves about half a MiB.
    assert point.held_bytes_measured == pytest.approx(point.held_bytes_computed, rel=0.05, abs=MIB)
    output = config.frame_tokens * 16 * 128 * 4
    assert point.peak_bytes >= point.held_bytes_measured + output - MIB
    assert point.call_seconds > 0
    assert point.repeats >= 1


def test_linear_attention_reads_the_whole_history():
    """The carried state gives what one call over all of the history gives."""
    query = torch.randn(1, 96, 2, 32)
    (key, value), keywords = profile._hold("linear attention", SMALL, 5, query)
    out = linear_attention(query, key, value, **keywords)
    whole = [x.repeat(1, 5, 1, 1) for x in (query, key, value)]
    expected = linear_attention(*whole)[:, :96]
    torch.testing.assert_close(out, expected)


def test_whole_history_is_attention_over_all_tokens():
    query = torch.randn(1, 96, 2, 32)
    (key, value), keywords = profile._hold("whole history", SMALL, 5, query)
    assert key.shape == (1, 5 * 96, 2, 32)
    assert torch.equal(key[:, :96], key[:, 96:192])
    scores = torch.einsum("blhd,bmhd->bhlm", query, key) / math.sqrt(32)
    expected = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), value)
    torch.testing.assert_close(cross_attention(query, key, value, **keywords), expected)


def test_profile_result_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    seen = []
    result = profile.profile(SMALL, progress=lambda *call: seen.append(call))
    assert [(p["strategy"], p["seconds"]) for p in result["points"]] == [
        (strategy, seconds) for strategy in STRATEGIES for seconds in (1.0, 4.0)
    ]
    assert seen[-1][1:] == (8, 8)
    assert result["device"]["type"] == "cpu" and result["device"]["name"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["config"]["heads"] == 2
    spread = max(p["call_seconds_slowest"] / p["call_seconds_fastest"] for p in result["points"])
    assert result["noisy"] == (spread > 3)
    whole = [p for p in result["points"] if p["strategy"] == "whole history"]
    assert [p["context_tokens"] for p in whole] == [6 * 96, 24 * 96]
    assert whole[1]["held_bytes_computed"] == 4 * whole[0]["held_bytes_computed"]
    files.write_json(tmp_path / "curve.json", result)
    assert json.loads((tmp_path / "curve.json").read_text()) == json.loads(json.dumps(result))
    report.write_memory_plot(tmp_path / "curve.png", result)
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.json", "curve.png"]


def test_history_beyond_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr("vidmem_model.measure.repeat.available_bytes", lambda: 2**30)
    with pytest.raises(UserError, match=r"take 2\.1 GiB.*1\.0 GiB are free.*--lengths"):
        profile.profile(ProfileConfig(lengths=(20.0,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": ()}, "lengths must be at least 0.001 seconds, got []"),
        ({"lengths": (1.0, math.nan)}, "lengths must be at least 0.001 seconds, got [1.0, nan]"),
        ({"heads": 0}, "heads must be positive, got 0"),
        ({"compression": (2, 4, 0)}, "compression: must be a mapping of keys to values, got (2, 4, 0)"),
        ({"dtype": "float8"}, "got 'float8'"),
    ],
)
def test_bad_configuration(values, message):
    with pytest.raises(ValueError) as caught:
        ProfileConfig(**values)
    assert message in str(caught.value)


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategy must be one of .* got 'all'"):
        measure_point("all", SMALL, 1.0)
