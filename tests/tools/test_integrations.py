"""The page on other people's models has the tables of the measurement; its recipe can be read, and the script runs."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from paths import ROOT

pytest.importorskip("diffusers")
sys.path.insert(0, str(ROOT))

from benchmarks import integrations, timing  # noqa: E402
from benchmarks.page_parts import marks, with_part  # noqa: E402

PAGE = (ROOT / "docs/integrations.md").read_text()


def test_the_page_has_the_tables_of_its_measurement():
    (name,) = set(re.findall(r"\]\(\.\./(benchmarks/results/integrations/\S+\.json)\)", PAGE))
    result = json.loads((ROOT / name).read_text())
    assert with_part(PAGE, integrations.PART, integrations.tables(result)) == PAGE
    assert result["complete"] and result["weights"] == "random" and result["latents"].startswith("sample film")
    assert result["device"]["name"] in PAGE and result["commit"] and not result["dirty"]
    for model in integrations.MODELS:
        for kind, ratios in (("error", integrations.RATIOS[1:]), ("cost", integrations.RATIOS)):
            rows = [row for row in result["rows"] if (row["kind"], row["model"]) == (kind, model)]
            choices = {(row["kv_ratio"], row["reused"]) for row in rows}
            assert choices == {(ratio, reused) for ratio in ratios for reused in (False, True) if ratio or not reused}


def test_what_the_page_names_is_there():
    for path in re.findall(r"`((?:tests|examples|vidmem_kernels|python)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    for name, path in re.findall(r"`(\w+)`[ \w]* in `([\w/.]+\.py)`", PAGE):
        assert name in (ROOT / path).read_text(), name


def test_a_quick_run(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(timing, "MAX_ROUNDS", 3)
    page = tmp_path / "page.md"
    begin, end = marks(integrations.PART)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    arguments = ["--quick", "--device", "cpu", "--page", str(page), "-o", str(tmp_path)]
    assert integrations.main(arguments) == 0 and torch.get_num_threads() == threads
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert result["complete"] and result["latents"] == "drawn" and result["versions"]["torch"] == torch.__version__
    made = integrations.tables(result)
    assert page.read_text() == f"before\n{begin}\n\n{made}\n\n{end}\nafter\n"
    assert made in capsys.readouterr().out
    # More is merged, more is lost; noise has fewer tokens that are alike.
    errors = {
        (row["noise"], row["reused"], row["kv_ratio"]): row["attention_error"]
        for row in result["rows"]
        if row["kind"] == "error"
    }
    for noise in integrations.NOISE:
        for reused in (False, True):
            found = [errors[noise, reused, ratio] for ratio in integrations.RATIOS[1:]]
            assert 0 < found[0] < found[1] < found[2]
            assert noise == integrations.NOISE[0] or found[1] > errors[integrations.NOISE[0], reused, 0.5]
    for row in result["rows"]:
        assert row["kind"] == "error" or 0 < row["attention_ms"] < row["median_ms"]


def test_merging_copies_share_weights_and_merge_what_they_say():
    model = integrations.make_model("tiny", torch.device("cpu"))
    latents = integrations.drawn_latents(0, 3)
    plain, half, kept = (integrations.merging_copy(model, *how) for how in ((0.0, False), (0.5, False), (0.5, True)))
    assert all(a is b for a, b in zip(model.parameters(), kept.parameters(), strict=True))
    expected = integrations.Forward(model, latents)(0.5)
    assert torch.equal(integrations.Forward(plain, latents)(0.5), expected)
    own, reused = integrations.Forward(half, latents), integrations.Forward(kept, latents)
    own(0.5), own(0.4), reused(0.5), reused(0.4)
    from vidmem_kernels.diffusers import TokenMerging

    stats = [TokenMerging(forward.model).stats() for forward in (own, reused)]
    assert [each["plans_made"] for each in stats] == [2 * len(model.blocks), 1]
    tokens, frame = 3 * 6 * 8, 6 * 8
    assert all(block["keys"] == frame + (tokens - frame) // 2 for block in stats[1]["blocks"].values())


@pytest.mark.parametrize("arguments", [["--frames", "1"], ["--error-frames", "1"], ["--models", "none"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        integrations.parse(arguments)
    assert "error: " in capsys.readouterr().err


def test_the_recipe_on_the_page(tmp_path, monkeypatch):
    """It is read with the sizes of Wan 1.3B, from the transformer's config.json in a pipeline's folder."""
    pytest.importorskip("vidmem_model")
    from vidmem_model.train.recipe import read_pretrain

    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    folder = tmp_path / re.search(r"diffusers: ([\w.-]+)", recipe).group(1) / "transformer"
    folder.mkdir(parents=True)
    sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **sizes}))
    (tmp_path / "memory.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    config = read_pretrain(tmp_path / "memory.yaml")
    dit = config.model.dit
    assert (dit.dim, dit.depth, dit.heads, dit.mlp, dit.diffusers) == (1536, 30, 12, 8960, folder.parent.name)
    assert config.lora_rank == 128 and config.model.vae.kind == "wan" and config.model.text.dim == 4096
