"""Former names of fields: recipes, models and runs that have them are read as before, recipes with a warning."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import yaml
from paths import GOLDEN

from vidmem_model.checks import FieldError, build, renewed
from vidmem_model.cli import main
from vidmem_model.errors import UserError
from vidmem_model.generation.generator import _fingerprint
from vidmem_model.model.config import PRESETS, Compression, EncoderConfig, ModelConfig
from vidmem_model.model.file import load_model
from vidmem_model.train import checkpoint
from vidmem_model.train import loop as training
from vidmem_model.train.config import TrainConfig
from vidmem_model.train.continuation import ContinuationConfig, FinetuneConfig
from vidmem_model.train.recipe import read_finetune, read_pretrain
from vidmem_model.train.retrieval import PretrainConfig
from vidmem_model.train.run import run_settings


def drawn(draw: random.Random) -> PretrainConfig:
    encoders = tuple(
        EncoderConfig(Compression(*(draw.choice((1, 2, 4, 8)) for _ in range(3))), channels=(8,), heads=2)
        for _ in range(draw.randrange(1, 4))
    )
    model = dataclasses.replace(PRESETS["tiny"], encoders=encoders)
    optimisation = TrainConfig(warmup_steps=draw.randrange(99), max_grad_norm=draw.uniform(0.1, 9))
    return PretrainConfig(model, "run", optimisation=optimisation)


def of_before(values):
    """Plain values of a PretrainConfig as earlier versions wrote them."""
    values = json.loads(json.dumps(values))
    for encoder in values["model"]["encoders"]:
        box = encoder.pop("compression")
        encoder["rate"] = [box["height"], box["width"], box["time"]]
    values["model"]["dit"]["patch"] = 2
    optimisation = values["optimisation"]
    optimisation["warmup"], optimisation["clip_norm"] = (
        optimisation.pop("warmup_steps"),
        optimisation.pop("max_grad_norm"),
    )
    return values


def flat(values, where=""):
    """Dotted keys, as a run keeps its settings."""
    if isinstance(values, list) and values and isinstance(values[0], dict):
        values = {str(i): value for i, value in enumerate(values)}
    if not isinstance(values, dict):
        return {where: values}
    return {k: v for key, value in values.items() for k, v in flat(value, f"{where}.{key}".lstrip(".")).items()}


@pytest.mark.parametrize("seed", range(20))
def test_earlier_names_mean_what_they_meant(seed, tmp_path, monkeypatch):
    draw = random.Random(seed)
    config = drawn(draw)
    before = of_before(dataclasses.asdict(config))
    assert build(PretrainConfig, before) == config
    assert ModelConfig.from_dict(before["model"]) == config.model
    assert renewed(PretrainConfig, before) == json.loads(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(before))
    assert read_pretrain(tmp_path / "a.yaml") == config
    # Over a preset, some of it in the earlier names.
    some = [
        {k: v for k, v in each.items() if k == "rate" or draw.random() < 0.5} for each in before["model"]["encoders"]
    ]
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({"model": {"preset": "tiny", "encoders": some}, "output": "run"}))
    read = read_pretrain(tmp_path / "b.yaml").model.encoders
    assert [each.compression for each in read] == [each.compression for each in config.model.encoders]

    # A run of before goes on, and one that differs is told so by the present name.
    settings, seen = run_settings(config), {"settings": flat(before)}
    monkeypatch.setattr(checkpoint, "newest", lambda folder: tmp_path)
    monkeypatch.setattr(checkpoint, "load", lambda path, state: 7)
    monkeypatch.setattr(checkpoint, "settings_of", lambda path: seen["settings"])
    assert training._resume(tmp_path, {}, settings, False) == 7
    last = len(config.model.encoders) - 1
    box = config.model.encoders[last].compression
    seen["settings"] = {**flat(before), f"model.encoders.{last}.rate": [box.height, box.width, 2 * box.time]}
    said = f"holds a run with model.encoders.{last}.compression.time={2 * box.time}, this run has "
    with pytest.raises(UserError, match=said):
        training._resume(tmp_path, {}, settings, False)
    seen["settings"] = {**flat(before), "optimisation.warmup": 100}
    with pytest.raises(UserError, match=r"holds a run with optimisation\.warmup_steps=100, this run has "):
        training._resume(tmp_path, {}, settings, False)


@pytest.mark.parametrize(
    "settings", [{"model.encoders.99999999999.rate": [1, 1, 1]}, {"a": 1, "a.b": 2}, {"": 3}, {".": 3}]
)
def test_settings_that_make_no_sense_are_another_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "newest", lambda folder: tmp_path)
    monkeypatch.setattr(checkpoint, "settings_of", lambda path: settings)
    with pytest.raises(UserError, match="holds a run with "):
        training._resume(tmp_path, {}, run_settings(drawn(random.Random(0))), False)


def test_both_names_are_one_too_many():
    with pytest.raises(FieldError, match=r"rate: is the former name of compression; give only compression, got both"):
        build(EncoderConfig, {"rate": [4, 4, 2], "compression": {"time": 2}})
    with pytest.raises(FieldError, match=r"max_change; give only max_change"):
        build(ContinuationConfig, {"most_change": 1.0, "max_change": 1.0})


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        (4, "must have 3 entries"),
        ([4, 4], "must have 3 entries"),
        ("442", "must have 3 entries"),
        ({"time": 2}, "must have 3 entries"),
        (None, "must have 3 entries"),
        ([4, 4, 2.5], "must have 3 entries"),
        ([4, 4, 256], "must have 3 entries"),
        ([4, 0, 2], "must have 3 entries"),
        ([4, 3, 2], "must be powers of two of at most 128, got [4, 3, 2]"),
    ],
)
def test_a_rate_that_is_none(rate, says, tmp_path):
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"output": "run", "model": {"preset": "tiny", "encoders": [{}, {"rate": rate}]}})
    )
    with pytest.raises(UserError) as error:
        read_pretrain(tmp_path / "a.yaml")
    assert f"model.encoders[1].rate: {says}" in str(error.value) and str(error.value).startswith(f"{tmp_path}/a.yaml:")


def test_another_patch_is_told():
    with pytest.raises(ValueError, match=r"dit\.patch: must be 2: a patch token is 2 x 2 latent cells, got 1"):
        ModelConfig.from_dict({"dit": {"patch": 1}})


def test_a_recipe_of_stage_two(tmp_path, capfd):
    """Former names give a DeprecationWarning with file, line and remedy, which the command prints as a note."""
    path = tmp_path / "a.yaml"
    path.write_text("from: one\noutput: run\nsampling: {most_change: 0.5}\noptimisation: {warmup: 3}\n")
    with pytest.warns(DeprecationWarning) as told:
        config = read_finetune(path)
    wanted = [
        f"{path}:3: sampling.most_change: most_change is deprecated; rename it to max_change",
        f"{path}:4: optimisation.warmup: warmup is deprecated; rename it to warmup_steps",
    ]
    assert [str(each.message) for each in told] == wanted and {each.filename for each in told} == {__file__}
    assert main(["finetune", str(path)]) == 2
    notes = capfd.readouterr().err.splitlines()
    assert notes[:2] == [f"vidmem: note: {line}" for line in wanted] and "one" in notes[2]
    assert config == FinetuneConfig(
        "one", "run", sampling=ContinuationConfig(max_change=0.5), optimisation=TrainConfig(warmup_steps=3)
    )


def test_no_former_name_no_warning(tmp_path, recwarn):
    (tmp_path / "a.yaml").write_text("output: run\nmodel: {preset: tiny, encoders: [{window: 2}]}\n")
    read_pretrain(tmp_path / "a.yaml")
    assert not [each for each in recwarn if each.category is DeprecationWarning]


def test_a_former_option(capfd, tmp_path):
    assert main(["profile", "--most-seconds", "3", "-o", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err.splitlines()
    assert err == [
        "vidmem: note: --most-seconds is deprecated; use --max-seconds",
        "vidmem: error: --max-seconds requires --model",
    ]


def test_shipped_recipes_have_the_present_names():
    recipes = sorted((Path(training.__file__).parents[1] / "recipes").glob("*.yaml"))
    assert len(recipes) >= 3
    for path in recipes:
        text = path.read_text()
        assert not any(f" {name}:" in text for name in ("rate", "warmup", "clip_norm", "most_change", "patch")), path


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (
            "optimisation:\n  steps: 3\n  clip_norm: -1\n",
            5,
            "optimisation.clip_norm: TrainConfig: max_grad_norm must be",
        ),
        ("optimisation:\n  steps: 3\n  warmup: abc\n", 5, "optimisation.warmup: must be of type int, got 'abc'"),
        (
            "model:\n  preset: tiny\n  encoders:\n    - {}\n    - rate: [4, 4]\n",
            7,
            "model.encoders[1].rate: must have 3 entries",
        ),
    ],
)
def test_a_wrong_value_is_told_by_the_name_that_the_file_has(text, line, says, tmp_path):
    (tmp_path / "a.yaml").write_text(f"output: run\n{'' if text.startswith('model') else 'model: tiny'}\n{text}")
    with pytest.raises(UserError) as error:
        read_pretrain(tmp_path / "a.yaml")
    assert str(error.value).startswith(f"{tmp_path}/a.yaml:{line}: {says}")


def test_a_key_that_is_none_is_unknown():
    with pytest.raises(ValueError, match="dit: keys must be among"):
        ModelConfig.from_dict({"dit": {"patch": 2, None: 3}})


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 129, 1), (1, 1, -1), (1, True, 1), (1, 2.5, 1), (1, "2", 1)])
def test_bounds_of_a_compression(values, tmp_path):
    names = ("time", "height", "width")
    with pytest.raises(ValueError, match=r"Compression: (time|height|width):? must be "):
        Compression(*values)
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(
            {"output": "run", "model": {"encoders": [{"compression": dict(zip(names, values, strict=True))}]}}
        )
    )
    with pytest.raises(UserError, match=r"a\.yaml:\d+: model\.encoders\[0\]\.compression\.(time|height|width): "):
        read_pretrain(tmp_path / "a.yaml")


def test_a_video_of_before_goes_on():
    """Its settings contain the fingerprint of the model, which the first versions computed with the former names."""
    model = load_model(GOLDEN / "models" / "tiny.safetensors")
    assert _fingerprint(model).startswith("4e8f0477279a8fec")
