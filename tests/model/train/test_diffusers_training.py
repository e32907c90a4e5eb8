"""Both stages with a diffusers transformer: trained weights, stored weights, and resuming."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys

import pytest
import torch
import yaml

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers_helpers import CHANNELS, HEADS, TEXT, tiny_framepack, tiny_hunyuan, tiny_wan, tiny_wan_i2v
from torch.distributed.checkpoint import FileSystemReader
from training_helpers import BOX, MODEL, TRAIN, block, latents

from vidmem_model.cli import main
from vidmem_model.errors import UserError
from vidmem_model.model.diffusers_dit import dit_config
from vidmem_model.model.dit import KVCache
from vidmem_model.model.encoder import History
from vidmem_model.model.file import load_model, save_model
from vidmem_model.model.lora import add_lora, merge_lora
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.train import loop as training
from vidmem_model.train.continuation import ContinuationConfig, Continuations
from vidmem_model.train.curve import read_curve
from vidmem_model.train.latents import Latents
from vidmem_model.train.retrieval import FrameQueries, QueryConfig
from vidmem_model.weights import WeightsFile

MAKERS = {"wan": tiny_wan, "hunyuan": tiny_hunyuan}
families = pytest.mark.parametrize("family", MAKERS)
# Where it takes seconds and both go the same way.
one_family = pytest.mark.parametrize("family", ["wan", pytest.param("hunyuan", marks=pytest.mark.long)])


def config_of(source, **dit):
    vae, text = dataclasses.replace(MODEL.vae, channels=CHANNELS), dataclasses.replace(MODEL.text, dim=TEXT)
    return dataclasses.replace(MODEL, vae=vae, text=text, dit=dit_config(source, **dit))


def build(family="wan", encoder=None, heads=HEADS, **dit):
    """A model around a tiny transformer, the same in every call."""
    transformer = MAKERS[family](layers=2)
    if heads != HEADS:
        sizes = dict(transformer.config) | {"num_attention_heads": heads, "attention_head_dim": 24}
        transformer = type(transformer).from_config(sizes).eval()
    torch.manual_seed(0)
    config = config_of(transformer, **dit)
    if encoder:
        config = dataclasses.replace(config, encoders=(dataclasses.replace(config.encoders[0], **encoder),))
    return MemoryModel(config, transformer=transformer)


def narrow(each):
    """A block with as many channels as the transformers have."""
    lows = {box: low[:CHANNELS] for box, low in each.lows.items()}
    return dataclasses.replace(each, latents=each.latents[:CHANNELS], lows=lows)


def still(films):
    """Videos of two repeated latent frames: the next frame follows from which video it is."""
    pairs = [narrow(block(2, 5 + film)) for film in range(films)]
    longer = [
        dataclasses.replace(
            pair, latents=pair.latents.repeat(1, 8, 1, 1), lows={BOX: pair.lows[BOX].repeat(1, 8, 1, 1)}
        )
        for pair in pairs
    ]
    return Latents(tuple(longer), 0.5)


def stage(number, data):
    """Samples of Stage I or II."""
    if number == 1:
        return FrameQueries(data, MODEL.encoders, QueryConfig(history=8, queries=2))
    return Continuations(data, MODEL.encoders, ContinuationConfig(history=8, targets=2))


def draw(batch=2, seed=0):
    """Inputs of a DiT, noisy frames at other places in each sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CHANNELS, 2, 4, 8, generator=generator)
    frames = torch.rand(batch, 2, generator=generator).mul(20).floor()
    history = History(
        torch.randn(batch, CHANNELS, 4, 4, 8, generator=generator),
        [torch.randn(batch, CHANNELS, 2, 2, 4, generator=generator)],
    )
    return x, torch.rand(batch, generator=generator), ["a rabbit", "two squirrels run"][:batch], frames, history


@torch.no_grad()
def predict(model, x, t, prompts, frames, history=None, **given):
    memory = model.remember(history) if history is not None else None
    return model.predict(x, t, prompts, frames=frames, memory=memory, **given)


@families
def test_without_memory_it_is_the_transformer(family):
    model, plain = build(family), MAKERS[family](layers=2)
    x, t, prompts, *_ = draw()
    text, mask = model.text(prompts)
    frames = torch.arange(2.0).expand(2, -1)
    given = {"encoder_hidden_states": text * mask[..., None]}
    if family == "wan":  # which sees the zeros that prompts are filled up with
        zeros = text.new_zeros(2, MODEL.text.max_tokens - text.shape[1], TEXT)
        given["encoder_hidden_states"] = torch.cat([given["encoder_hidden_states"], zeros], 1)
    else:
        guidance, pooled = torch.full((2,), 6000.0), torch.zeros(2, plain.config.pooled_projection_dim)
        given |= {"encoder_attention_mask": mask, "pooled_projections": pooled, "guidance": guidance}
    with torch.no_grad():
        expected = plain(hidden_states=x, timestep=1000 * t, return_dict=False, **given)[0]
    torch.testing.assert_close(predict(model, x, t, prompts, frames), expected, rtol=0, atol=2e-6)
    # One offset of all frames changes nothing, another distance between them does.
    moved = predict(model, x, t, prompts, frames + torch.tensor([[37.0], [5.0]]))
    torch.testing.assert_close(moved, expected, rtol=0, atol=2e-6)
    assert not torch.allclose(predict(model, x, t, prompts, 3 * frames), expected, atol=1e-4)


@families
def test_samples_of_a_batch_do_not_see_each_other(family):
    model = build(family)
    x, t, prompts, frames, history = draw()
    window = {"window": x.flip(0), "window_frames": frames - 30}
    both = predict(model, x, t, prompts, frames, history, **window)
    for i in range(2):
        one = [each[i : i + 1] for each in (x, t, prompts, frames)]
        own = {key: value[i : i + 1] for key, value in window.items()}
        alone = predict(model, *one, history.map(lambda part, i=i: part[i : i + 1]), **own)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=2e-6)
    without = predict(model, x, t, prompts, frames)
    assert not torch.allclose(both, without, atol=1e-4)
    # Where everything is later by as much, the same comes out.
    later = predict(model, x, t, prompts, frames + 2, history, window=x.flip(0), window_frames=frames - 28)
    assert not torch.allclose(both, later, atol=1e-4)  # the memory has stayed where it was
    memory = model.remember(history)
    moved = memory._replace(positions=memory.positions + torch.tensor([2.0, 0.0, 0.0]))
    given = {"frames": frames + 2, "window": x.flip(0), "window_frames": frames - 28, "memory": moved}
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x, t, prompts, **given), both, rtol=0, atol=2e-6)
    # The first projection, which encoders call, has no memory in it.
    assert model.dit.patch_embed(x).shape == (2, 2 * 2 * 4, model.config.dit.dim)


@one_family
@pytest.mark.parametrize("number", [1, 2])
def test_the_loss_falls(family, number, tmp_path):
    """Only the encoder and adapters are trained; the weights of the transformer do not change."""

    def fresh():
        model = build(family)
        add_lora(model, 8)
        return model

    config = dataclasses.replace(TRAIN, steps=25, batch=4, lr=2e-2, schedule="constant", checkpoint_every=100)
    model = training.fit(fresh, stage(number, still(1)), config, tmp_path, {}, torch.device("cpu"))
    losses = [row["loss"] for row in read_curve(tmp_path / "curve.csv")]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8]), losses
    before, after = fresh().state_dict(), model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {"dit", "encoders", "text"}
    assert all(".lora_" in name for name in changed if name.startswith("dit."))


@families
def test_products_in_bfloat16(family):
    """With autocast, as in the loop, gradients equal those of float32 up to rounding."""
    found = []
    for enabled in (False, True):
        model = build(family, memory_cross_attention=True)
        add_lora(model, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            training.FlowMatching(model)(stage(1, still(1))(0, range(2))).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.encoders.parameters()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_it_learns_to_read_the_memory(number, tmp_path):
    """Six videos of one picture, which only the memory shows: with the memory of another video the loss is higher."""

    def fresh():
        model = build(heads=4)
        add_lora(model, 16)
        return model

    draw = stage(number, still(6))
    config = dataclasses.replace(TRAIN, steps=250, batch=8, lr=1e-2, checkpoint_every=1000)
    objective = training.FlowMatching(training.fit(fresh, draw, config, tmp_path, {}, torch.device("cpu")))
    right = wrong = 0.0
    with torch.no_grad():
        for step in range(1000, 1010):
            batch = draw(step, range(8))._replace(window=None, window_frames=None)
            right += float(objective(batch))
            wrong += float(objective(batch._replace(history=batch.history.map(lambda part: part.roll(1, 0)))))
    assert right < 0.8 * wrong, (right, wrong)


@families
def test_cross_attention_to_the_memory_learns_beside_adapters(family, tmp_path):
    """Its gate is zero at first; all its weights are trained, with or without adapters, and stored."""
    model, inputs = build(family, memory_cross_attention=True, memory_in_sequence=False), draw()
    closed, without = predict(model, *inputs), predict(model, *inputs[:-1])
    assert torch.equal(closed, without)
    with torch.no_grad():
        for parameter in model.dit.cross.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(predict(model, *inputs), without, atol=1e-4)
    assert torch.equal(predict(model, *inputs, memory_cross_attention=False), without)
    assert torch.equal(predict(model, *inputs[:-1]), without)
    add_lora(model, 2)
    trained = {name for name, p in model.dit.named_parameters() if p.requires_grad}
    readers = {id(p) for p in model.dit.cross.parameters()}
    assert readers == {id(p) for p in model.dit.added()}
    assert readers <= {id(p) for p in model.dit.parameters() if p.requires_grad}
    assert all(".lora_" in name or ".reader." in name for name in trained)
    training.FlowMatching(model)(stage(1, still(1))(0, range(2))).backward()
    for name, parameter in model.named_parameters():
        assert not name.startswith("encoders.") or parameter.grad is not None, name
    merge_lora(model)
    expected = predict(model, *inputs)
    file = save_model(tmp_path, model)
    names = WeightsFile(file).shapes
    assert all(".update_" in name or ".reader." in name for name in names if name.startswith("dit."))
    loaded = load_model(file, transformer=MAKERS[family](layers=2))
    torch.testing.assert_close(predict(loaded, *inputs), expected, rtol=0, atol=2e-6)


def trained(folder, steps, restart=False, kill_at=None, **dit):
    """A run of Stage I with adapters, which SIGINT interrupts in a step, if asked for."""

    def fresh():
        model = build(**dit)
        add_lora(model, 2)
        return model

    whole = latents()
    queries = stage(1, dataclasses.replace(whole, blocks=tuple(map(narrow, whole.blocks))))

    def batches(step, samples):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGINT)
        return queries(step, samples)

    config = dataclasses.replace(TRAIN, steps=steps, checkpoint_every=4)
    return training.fit(fresh, batches, config, folder, {}, torch.device("cpu"), restart)


def test_a_stopped_run_goes_on_exactly_and_its_checkpoints_hold_what_is_trained(tmp_path):
    whole = trained(tmp_path / "whole", 8)
    with pytest.raises(training.Interrupted):
        trained(tmp_path / "stopped", 8, kill_at=5)
    resumed = trained(tmp_path / "stopped", 8).state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.state_dict().items())
    names = {name for name, p in whole.named_parameters() if p.requires_grad or ".lora_" in name}
    names |= {name for name, _ in whole.named_parameters() if not name.startswith("dit.")}
    metadata = FileSystemReader(tmp_path / "stopped" / "checkpoints" / "step-00000008").read_metadata()
    kinds = ("weight", "ema", "step", "exp_avg", "exp_avg_sq")
    assert set(metadata.state_dict_metadata) == {f"{kind}.{name}" for kind in kinds for name in names}


@families
def test_a_models_file_holds_no_weight_of_the_transformer(family, tmp_path):
    """Nor does it need adapters twice: those of both stages are in it, and the model is the same."""
    model, inputs = build(family), draw()
    for rank in (2, 3):
        add_lora(model, rank)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        merge_lora(model)
        file = save_model(tmp_path / f"rank{rank}.safetensors", model, {"steps": rank})
    expected = predict(model, *inputs)
    assert not torch.allclose(expected, predict(build(family), *inputs), atol=1e-3)
    loaded = load_model(file, transformer=MAKERS[family](layers=2))
    torch.testing.assert_close(predict(loaded, *inputs), expected, rtol=0, atol=2e-6)
    assert loaded.extra == {"steps": 3} and loaded.config.dit.lora_rank == 5
    for name, shape in WeightsFile(file).shapes.items():
        assert not name.startswith("dit.") or name.endswith((".update_A", ".update_B")), name
        assert 5 in shape or not name.startswith("dit."), name
    again = save_model(tmp_path / "again", loaded)
    theirs = load_model(again, transformer=MAKERS[family](layers=2)).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(UserError, match="no such folder; give the folder of the transformer"):
        load_model(file)
    # Where it lies beside the model's file, nothing needs to be said.
    MAKERS[family](layers=2).save_pretrained(tmp_path / "transformer")
    beside = load_model(file)
    assert beside.config.dit.diffusers == str(tmp_path / "transformer")
    assert torch.equal(predict(beside, *inputs), predict(loaded, *inputs))


@pytest.mark.parametrize("branches", ["both", "lr", "hr", "patchifier"])
def test_an_encoder_may_have_its_own_width(branches):
    """Its tokens are projected; a history in pieces gives those of the whole."""
    model, (*_, history) = build(encoder={"branches": branches, "width": 20}), draw()
    encoder = model.encoders[0]
    made = model.remember(history)
    assert made.tokens.shape == (2, 2 * 1 * 2, model.config.dit.dim) and encoder.output.in_features == 20
    made.tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    state, parts = None, []
    for i in range(2):
        piece = history.latents[:, :, 2 * i : 2 * i + 2], history.lows[0][:, :, i : i + 1]
        tokens, state = encoder.append(*piece, model.dit.patch_embed, state)
        parts.append(tokens)
    torch.testing.assert_close(torch.cat([part.tokens for part in parts], 1), made.tokens, rtol=0, atol=1e-5)


@one_family
def test_commands_from_a_folder_to_a_video(family, tmp_path, capsys, monkeypatch):
    """Stage I and II by their YAML files, and a video from what they leave; the transformer is named once."""
    made = MAKERS[family](layers=2)
    made.save_pretrained(tmp_path / "model" / "transformer")
    whole = latents()
    narrowed = dataclasses.replace(whole, blocks=tuple(map(narrow, whole.blocks)))
    monkeypatch.setattr("vidmem_model.train.run.prepare", lambda *_: narrowed)
    same = {"optimisation": {"steps": 2, "batch": 2, "threads": 1, "device": "cpu"}, "lora_rank": 2}
    model = {
        "preset": "tiny",
        "vae": {"kind": "dct", "channels": CHANNELS},
        "dit": {"diffusers": str(tmp_path / "model")},
    }
    one = {**same, "model": model, "output": str(tmp_path / "one"), "sampling": {"history": 8}}
    two = {**same, "from": str(tmp_path / "one"), "output": str(tmp_path / "two")}
    two["sampling"] = {"history": 8, "targets": 2}
    for name, command, recipe in (("one", "pretrain", one), ("two", "finetune", two)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        assert main([command, str(tmp_path / f"{name}.yaml")]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / name / "model.safetensors")
    first, second = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    assert (first.config.dit.lora_rank, second.config.dit.lora_rank) == (2, 4)
    assert second.config.dit.dim == second.encoders[0].dim == made.config.num_attention_heads * 12
    # Stored in eight bits, it is found beside the same transformer.
    assert main(["export", str(tmp_path / "two"), "-o", str(tmp_path / "small" / "memory.safetensors")]) == 0
    stored, inputs = load_model(tmp_path / "small" / "memory.safetensors"), draw()
    torch.testing.assert_close(predict(stored, *inputs), predict(second, *inputs), rtol=0, atol=1e-2)
    # Adapters alone, where nothing else was trained in Stage II.
    three = {**two, "output": str(tmp_path / "three"), "freeze_encoder": True}
    (tmp_path / "three.yaml").write_text(yaml.safe_dump(three))
    assert main(["finetune", str(tmp_path / "three.yaml")]) == 0
    (tmp_path / "three" / "model.safetensors").rename(tmp_path / "three" / "whole.safetensors")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "three" / "base.safetensors")
    adapters = tmp_path / "three" / "adapters.safetensors"
    assert main(["export", str(tmp_path / "three"), "-o", str(adapters), "--base", "base.safetensors"]) == 0
    whole, added = load_model(tmp_path / "three" / "whole.safetensors"), load_model(adapters)
    torch.testing.assert_close(predict(added, *inputs), predict(whole, *inputs), rtol=0, atol=1e-2)
    assert added.dit.config.lora_rank == whole.config.dit.lora_rank == 4
    capsys.readouterr()
    (tmp_path / "board.yaml").write_text("shots: [{at: 0, prompt: a rabbit}]")
    video = tmp_path / "made.mp4"
    generate = ["generate", str(tmp_path / "board.yaml"), "-o", str(video), "--model", str(tmp_path / "two")]
    generate += ["--seconds", "1.5", "--steps", "1", "--segment", "2", "--device", "cpu"]
    assert main(generate) == 0
    said = capsys.readouterr().out
    assert "memory 0 -> 4 tokens" in said and video.is_file(), said
    assert main([*generate, "--kv-cache", "--restart"]) == 2
    assert "a diffusers transformer supports no KV cache; leave out --kv-cache" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a Wan transformer, and folders without a usable one."""
    made = tmp_path_factory.mktemp("folders")
    makers = {"wan": tiny_wan, "cut": tiny_wan, "i2v": tiny_wan_i2v, "pack": tiny_framepack}
    for name, make in makers.items():
        make(1).save_pretrained(made / name)
    weights = next((made / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    described = {"none": None, "list": "[1]", "damaged": "{", "vae": '{"_class_name": "AutoencoderKLWan"}'}
    described["short"] = '{"_class_name": "WanTransformer3DModel", "num_layers": "3"}'
    for name, text in described.items():
        (made / name).mkdir()
        if text is not None:
            (made / name / "config.json").write_text(text)
    return made


@pytest.mark.parametrize(
    "dit, other, says",
    [
        ("diffusers: gone", "", "gone: no such folder; give the folder of the transformer"),
        ("diffusers: none", "", "none/config.json: cannot be read (No such file or directory)"),
        ("diffusers: list", "", "list/config.json: is not the configuration of a diffusers model"),
        ("diffusers: damaged", "", "damaged/config.json: is not the configuration of a diffusers model"),
        ("diffusers: short", "", "short/config.json: num_attention_heads must be a positive whole number, got None"),
        ("diffusers: vae", "", "vae: the transformer must be one of WanTransformer3DModel"),
        ("diffusers: pack", "", "the transformer must be one of"),
        ("diffusers: cut", "", "cut: the weights of WanTransformer3DModel cannot be read"),
        ("diffusers: i2v", "", "model.vae.channels must be 8 as in the transformer"),
        ("diffusers: wan, dim: 48", "", "model.dit.dim must be 24 as in"),
        ("diffusers: wan, unfold: 32", "", "unfold must be 0 for a transformer of diffusers, got 32"),
        ("diffusers: wan, memory_in_sequence: false", "", "memory_in_sequence must be True without"),
        ("diffusers: 3", "", "model.dit.diffusers: must be of type str, got 3"),
        ("diffusers: wan", "vae: {kind: dct, channels: 8}", "model.vae.channels must be 4 as in the transformer"),
        ("diffusers: wan", "text: {dim: 17}", "model.text.dim must be 16 as in the transformer"),
        ("diffusers: wan", "linear_start: 4", "linear_start must be 0 if model.dit.diffusers or"),
        ("dim: 48", "lora_rank: 4", "lora_rank must be 0 unless model.dit.diffusers is set, got 4"),
    ],
)
def test_a_wrong_transformer_is_one_line(folders, tmp_path, capsys, monkeypatch, dit, other, says):
    monkeypatch.setattr("vidmem_model.train.run.prepare", lambda *_: latents())
    monkeypatch.chdir(folders)
    key, _, value = other.partition(": ")
    model = {"vae": "{kind: dct, channels: 4}", "dit": f"{{{dit}}}"} | ({key: value} if key in ("vae", "text") else {})
    lines = ["model:", "  preset: tiny", *(f"  {name}: {text}" for name, text in model.items())]
    lines += [f"output: {tmp_path}", "sampling: {history: 8}"]
    file = tmp_path / "a.yaml"
    file.write_text("\n".join(lines + ([other] if key not in model else [])))
    assert main(["pretrain", str(file)]) == 2
    *before, said = capsys.readouterr().err.splitlines()
    assert says in said and all("blocks of" in line for line in before), said


def test_without_diffusers_it_is_one_line(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="WanTransformer3DModel needs diffusers: pip install"):
        MemoryModel(config_of(str(folders / "wan")))


def test_what_it_does_not_do_is_said():
    model, (x, t, prompts, frames, _) = build(), draw()
    with pytest.raises(ValueError, match=r"t must be \(B,\) for a transformer of diffusers"):
        predict(model, x, t[:, None].expand(-1, 2), prompts, frames)
    with pytest.raises(ValueError, match="cache must be None for a transformer of diffusers"):
        predict(model, x, t, prompts, frames, cache=KVCache())
    with pytest.raises(ValueError, match=r"latents must be \(B, 4, T, H, W\) with even H and W"):
        model.dit.patch_embed(x[..., :3])
    with pytest.raises(UserError, match="the transformer must be one of WanTransformer3DModel, .*got Linear"):
        dit_config(torch.nn.Linear(2, 2))
