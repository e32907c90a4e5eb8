"""The whole model: encoding a history, retrieving frames, and the model file."""

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from text_helpers import tiny_umt5

from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.model.config import PRESETS, Compression, EncoderConfig, TextConfig
from vidmem_model.model.encoder import History
from vidmem_model.model.file import load_model, save_model
from vidmem_model.model.lora import add_lora, merge_lora
from vidmem_model.model.memory_model import MemoryModel

TINY = PRESETS["tiny"]  # latents of 8 channels, 4 x 8 cells, compressed 2 x 2 x 2


def made(seed=0, **changes):
    torch.manual_seed(seed)
    model = MemoryModel(dataclasses.replace(TINY, **changes)).eval()
    with torch.no_grad():  # away from the zeros of a fresh model
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def history(model, batch=1):
    latents = torch.randn(batch, 8, 4, 4, 8, generator=torch.Generator().manual_seed(7))
    return History(latents, [latents[:, :, ::2, ::2, ::2] for _ in model.encoders])


def test_memory_of_several_encoders_is_one_after_another():
    second = dataclasses.replace(TINY.encoders[0], compression=Compression(4, 2, 2))
    model = made(encoders=(*TINY.encoders, second))
    latents, _ = history(model)
    lows = [latents[:, :, ::2, ::2, ::2], latents[:, :, ::4, ::2, ::2]]
    memory = model.remember(History(latents, lows))
    parts = [encoder(latents, low, model.dit.patch_embed) for encoder, low in zip(model.encoders, lows, strict=True)]
    # 2 x 4 patch tokens a frame: boxes of 2 frames give 2 x (1 x 2) tokens, boxes of 4 frames 1 x (1 x 2).
    assert memory.tokens.shape == (1, 4 + 2, 48)
    assert torch.equal(memory.tokens, torch.cat([part.tokens for part in parts], 1))
    assert memory.positions[0, :, 0].tolist() == [0.5, 0.5, 2.5, 2.5, 1.5, 1.5]
    assert memory.positions[0, :2, 1:].tolist() == [[0.5, 0.5], [0.5, 2.5]]
    with pytest.raises(ValueError, match="lows must have one entry for each encoder"):
        model.remember(History(latents, lows[:1]))


def test_prediction_depends_on_prompt_and_memory():
    model = made()
    memory = model.remember(history(model, 2))
    x, t, frames = torch.randn(2, 8, 1, 4, 8), torch.tensor([0.5, 0.5]), torch.tensor([[1.0], [3.0]])
    out = model.predict(x, t, ["a red cat", ""], frames=frames, memory=memory)
    torch.testing.assert_close(out, model.dit(x, t, *model.text(["a red cat", ""]), frames=frames, memory=memory))
    other = model.predict(x, t, ["a blue dog", ""], frames=frames, memory=memory)
    assert (out - other)[0].abs().max() > 1e-4
    torch.testing.assert_close(other[1], out[1])
    assert (out - model.predict(x, t, ["a red cat", ""], frames=frames)).abs().max() > 1e-4


@pytest.mark.parametrize("history_sees_video", [False, True])
def test_retrieval_follows_the_velocity_from_seeded_noise(history_sees_video):
    model = made(dit=dataclasses.replace(TINY.dit, history_sees_video=history_sees_video))
    memory = model.remember(history(model, 2))
    given = {"frames": torch.tensor([[0.0], [2.0]]), "prompts": ["cat", "dog"], "steps": 3, "shift": 2.0}
    got = model.retrieve(memory, **given, generator=torch.Generator().manual_seed(1))

    x = torch.randn((2, 8, 1, 4, 8), generator=torch.Generator().manual_seed(1))
    times = [1.0, 0.8, 0.5, 0.0]  # thirds, shifted by 2
    with torch.no_grad():
        for now, following in zip(times[:-1], times[1:], strict=True):
            t = torch.full((2,), now)
            x = x + (following - now) * model.predict(x, t, ["cat", "dog"], frames=given["frames"], memory=memory)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)

    near = model.retrieve(memory, **given, generator=torch.Generator().manual_seed(1), approximate=True)
    assert torch.equal(near, got) != history_sees_video
    torch.testing.assert_close(near, got, atol=0.5, rtol=0.5)
    assert model.retrieve(memory, **given, size=(2, 4)).shape == (2, 8, 1, 2, 4)


def test_latents_are_padded_to_whole_patches():
    assert made(height=33, width=64).config.latent_size == (6, 8)


@pytest.mark.parametrize("where", ["model.safetensors", "run", "a/b/best.safetensors"])
def test_saved_and_loaded_to_the_bit(tmp_path, where):
    model = made(encoders=(TINY.encoders[0], EncoderConfig(compression=Compression(4, 2, 2), branches="lr")))
    file = save_model(tmp_path / where, model, {"step": 12, "data": ["film"]})
    assert file.is_file() and file.suffix == ".safetensors"
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # nothing temporary is left
    again = load_model(tmp_path / where)
    assert again.config == model.config and again.extra == {"step": 12, "data": ["film"]}
    assert again.vae_weights is None and not again.training
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_stored_as_float16_beside_its_vae(tmp_path):
    model = made()
    whole, half = (save_model(tmp_path / dtype, model, dtype=dtype) for dtype in ("float32", "float16"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    (half.parent / "vae.safetensors").write_bytes(b"")
    again = load_model(half)
    assert again.vae_weights == half.parent / "vae.safetensors"
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half().float())
    with torch.no_grad():
        model.dit.head_table[0, 0] = 1e6
    with pytest.raises(ValueError, match="in the range of float16, got dit.head_table"):
        save_model(tmp_path, model, dtype="float16")


def test_stored_in_eight_bits(tmp_path):
    model = made()
    file = save_model(tmp_path, model, dtype="int8")
    again = load_model(file).state_dict()
    eight = 0
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or tensor.numel() < 4096:
            assert torch.equal(again[name], tensor)
            continue
        rows, back = tensor.flatten(1), again[name].flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 127
        assert ((back - rows).abs() <= 0.5001 * scale).all() and not torch.equal(back, rows)
        eight += 1
    assert eight == 9
    with torch.no_grad():
        model.dit.head.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="in the range of int8, got dit.head.weight"):
        save_model(tmp_path, model, dtype="int8")
    with pytest.raises(ValueError, match="dtype must be one of"):
        save_model(tmp_path, model, dtype="int4")


def test_a_pretrained_text_encoder_stays_in_its_folder(tmp_path):
    folder = tiny_umt5(tmp_path / "umt5")
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, text=TextConfig(kind="transformers", dim=8, max_tokens=4))
    model = MemoryModel(config, folder)
    file = save_model(tmp_path, model)
    with safe_open(file, framework="pt") as opened:
        assert not any(name.startswith("text.") for name in opened.keys())  # noqa: SIM118
    again = load_model(file, folder)
    torch.testing.assert_close(again.text(["a cat"])[0], model.text(["a cat"])[0])
    with pytest.raises(UserError, match="give its folder"):
        load_model(file).text(["a cat"])


def test_adapters_are_merged_before_saving(tmp_path):
    pytest.importorskip("peft")
    model = made()
    add_lora(model, rank=1)
    with pytest.raises(ValueError, match="merge_lora"):
        save_model(tmp_path, model)
    merge_lora(model)
    load_model(save_model(tmp_path, model))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model = made()
    file = save_model(tmp_path, model)
    before = file.read_bytes()

    def full(tensors, path, metadata):
        with open(path, "wb") as half_written:
            half_written.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vidmem_model.weights.save_file", full)
    with pytest.raises(UserError, match="cannot be written .No space left"):
        save_model(tmp_path, made(1))
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [file.name]


def altered(file, name, drop=(), **header):
    """A copy of a model's file with another header, or without some tensors."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | header
        tensors = {key: opened.get_tensor(key) for key in opened.keys() if key not in drop}  # noqa: SIM118
    path = file.parent / f"{name}.safetensors"
    save_file(tensors, path, metadata={k: v for k, v in metadata.items() if v is not None})
    return path


def test_wrong_and_damaged_files_are_told(tmp_path):
    file = save_model(tmp_path, made())
    wider = json.dumps(dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, mlp=32)).to_dict())
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-100])
    for path, message in [
        (cut, "is damaged or not a safetensors file"),
        (altered(file, "foreign", format="pt"), "is not a file of format vidmem.model"),
        (altered(file, "newer", version="2"), "has format version 2, this vidmem reads version 1"),
        (altered(file, "bare", config=None), "its header is damaged .'config'"),
        (altered(file, "odd", config='{"dit": {"dims": 3}}'), "its header is damaged .dit: keys must be among"),
        (altered(file, "part", drop=["dit.head.bias"]), "do not fit its configuration .no dit.head.bias"),
        (altered(file, "wider", config=wider), "do not fit its configuration"),
    ]:
        with pytest.raises(MemoryFormatError, match=message):
            load_model(path)
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "missing")
