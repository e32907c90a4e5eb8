"""Memory files of method learned: only the same model reads them, and always to the same frame."""

import dataclasses
import hashlib
import json

import pytest
import torch

pytest.importorskip("av")

from film_helpers import make_video
from tiny_helpers import CONFIG, film, tiny_model

from vidmem_model import cli, demo, shipped
from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.evaluate import retrieval
from vidmem_model.evaluate.metrics import psnr
from vidmem_model.measure.attention import ProfileConfig
from vidmem_model.memory import learned
from vidmem_model.memory.compressor import compress
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.file import read_memory, write_memory
from vidmem_model.model.config import Compression
from vidmem_model.model.encoder import count_tokens
from vidmem_model.model.file import load_model, save_model
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.show import tables
from vidmem_model.video import read_clip
from vidmem_model.video.clip import ClipSpec


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose checkpoint is a tiny model with random weights."""
    folder = tmp_path / "checkpoints"
    save_model(folder / "demo.safetensors", tiny_model())
    monkeypatch.setattr(shipped, "CHECKPOINTS", folder)
    learned.open_model.cache_clear()
    yield folder
    learned.open_model.cache_clear()


@pytest.fixture
def empty_package(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "CHECKPOINTS", tmp_path / "none")
    learned.open_model.cache_clear()


def remember(frames):
    return compress(frames, CompressorConfig("learned"), fps=8.0)


def test_file_holds_the_tokens_and_gives_frames_back(package, tmp_path):
    frames = film(22)  # six latent frames, the last of them half full
    path = tmp_path / "memory.safetensors"
    write_memory(path, remember(frames))
    opened = read_memory(path)
    assert (opened.method, opened.frames, opened.height, opened.width) == ("learned", 22, 32, 64)
    memory = learned.open_model("demo")
    tokens, positions = memory.remember(memory.encode(frames))
    assert len(opened.bank) == tokens.shape[1] == count_tokens(CONFIG.encoders[0], CONFIG.vae, 24, 32, 64)
    assert torch.equal(opened.bank.positions, positions[0])
    rows = opened.bank.gather(torch.arange(len(opened.bank)), out_dtype=torch.float32) * opened.bank.extras["scale"]
    assert torch.allclose(rows, tokens[0], rtol=2e-3, atol=1e-6)
    # By hand: latent frames up to that of frame 14, made together, then decoded as a stream.
    made = memory.retrieve(learned.MemoryTokens(rows[None], positions), [0, 1, 2, 3], learned.DEFAULT_STEPS)
    expected = memory.decode(made, (16, 32, 64))[14]
    assert torch.equal(opened.retrieve(14), expected) and torch.equal(read_memory(path).retrieve(14), expected)
    assert not torch.equal(opened.retrieve(14, steps=1), expected)
    assert opened.retrieve(21).shape == (32, 64, 3)
    with pytest.raises(UserError, match="give a frame from 0 to 21"):
        opened.retrieve(22)


def test_each_frame_comes_from_its_latent_frame(package, tmp_path, monkeypatch):
    """A model that answers with the numbers of the latent frames it is asked for."""
    write_memory(tmp_path / "m", remember(film(22)))
    opened = read_memory(tmp_path / "m")
    memory = learned.open_model("demo")
    asked = []

    def retrieve(tokens, frames, steps, seed=0):
        asked.append(frames)
        return torch.tensor(frames).float().view(1, 1, -1, 1, 1).expand(1, 8, -1, 4, 8)

    decoded = lambda latents, size: torch.arange(size[0])[:, None, None, None].expand(-1, 1, 1, 3)  # noqa: E731
    monkeypatch.setattr(memory, "retrieve", retrieve)
    monkeypatch.setattr(memory, "decode", decoded)
    memory.queries = 3
    found = [int(opened.retrieve(frame)[0, 0, 0]) for frame in (0, 3, 5, 11, 12, 21)]
    assert asked == [[0], [0], [0, 1], [0, 1, 2], [1, 2, 3], [3, 4, 5]]
    assert found == [0, 3, 5, 11, 8, 9]


def test_video_frames_of_latent_positions():
    assert retrieval.latent_positions(9, 1, 4) == [range(0, 1), range(1, 5), range(5, 9)]
    assert retrieval.latent_positions(22, 4, 4)[-1] == range(20, 22)


def test_another_model_does_not_read_it(package, tmp_path):
    path = tmp_path / "memory.safetensors"
    write_memory(path, remember(film(8)))
    save_model(package / "demo.safetensors", tiny_model(seed=1))
    learned.open_model.cache_clear()
    with pytest.raises(MemoryFormatError, match="another version of the trained model 'demo'; make the file again"):
        read_memory(path)
    (package / "demo.safetensors").unlink()
    learned.open_model.cache_clear()
    with pytest.raises(MemoryFormatError, match="trained model 'demo', which this installation lacks"):
        read_memory(path)


def test_a_model_is_known_by_what_its_file_says(package, tmp_path):
    """The hash ignores the header's order; memories with the former hash, of the file's bytes, are still read."""
    model, path = package / "demo.safetensors", tmp_path / "memory.safetensors"
    made = remember(film(8))
    former = {"model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(), "vae_sha256": made.meta["vae_sha256"]}
    write_memory(tmp_path / "former", dataclasses.replace(made, meta={**made.meta, **former}))
    write_memory(path, made)
    for memory in (path, tmp_path / "former"):
        assert read_memory(memory).method == "learned"
    content = model.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header["__metadata__"] = dict(reversed(header["__metadata__"].items()))
    text = json.dumps(dict(reversed(header.items()))).encode()
    text += b" " * (-len(text) % 8)
    model.write_bytes(len(text).to_bytes(8, "little") + text + content[size:])
    learned.open_model.cache_clear()
    assert read_memory(path).method == "learned"
    with pytest.raises(MemoryFormatError, match="another version"):
        read_memory(tmp_path / "former")


@pytest.mark.parametrize("name", ["../demo", "demo.x", ""])
def test_name_of_a_model_is_no_path(package, tmp_path, name):
    made = remember(film(8))
    made = dataclasses.replace(made, meta={**made.meta, "model": name})
    write_memory(tmp_path / "m", made)
    with pytest.raises(MemoryFormatError, match="this installation lacks"):
        read_memory(tmp_path / "m")


def test_frames_of_another_size_are_refused(package):
    with pytest.raises(UserError, match="takes frames of 32x64, got 40x64"):
        remember(torch.zeros(8, 40, 64, 3, dtype=torch.uint8))


def test_commands(package, tmp_path, capfd):
    video = make_video(tmp_path / "film.mkv", frames=24)
    path, image = tmp_path / "memory.safetensors", tmp_path / "frame.png"
    assert cli.main(["compress", str(video), "-o", str(path), "-m", "learned", "--seconds", "1"]) == 0
    assert "8 frames of 32x64 at 8 fps, 16 -> 2 tokens (8.0x)" in capfd.readouterr().out
    assert json.loads(read_memory(path).bank.metadata["size"]) == [8, 32, 64]
    assert cli.main(["retrieve", str(path), "--frame", "7", "-o", str(image), "--steps", "2"]) == 0
    assert "from 2 learned tokens" in capfd.readouterr().out
    assert cli.main(["compress", str(video), "-o", str(path), "-m", "learned", "--rate", "4x4x2"]) == 2
    assert "--rate is not allowed with --method learned" in capfd.readouterr().err
    assert cli.main(["compress", str(video), "-o", str(path), "--size", "32x64", "--fps", "8", "--seconds", "1"]) == 0
    assert cli.main(["retrieve", str(path), "--frame", "7", "-o", str(image), "--steps", "2"]) == 2
    assert (
        "steps requires a memory of method learned, this one is of method dct; leave steps out"
        in capfd.readouterr().err
    )


def test_without_a_checkpoint_the_way_out_is_told(empty_package, tmp_path, capfd):
    assert cli.main(["compress", "a.mp4", "-o", str(tmp_path / "m"), "-m", "learned"]) == 2
    assert "'demo' is not installed; use --method dct or merge" in capfd.readouterr().err


def test_demo_shows_the_learned_memory_at_its_own_size(package, tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("vidmem_model.measure.repeat._SLOW_SECONDS", 0.02)
    video = make_video(tmp_path / "film.mkv", frames=24)
    config = demo.DemoConfig(
        video=video,
        clip=ClipSpec(80, 112, 24.0, 0.0, 1.0),
        frames=2,
        compression=Compression(2, 2, 2),
        trained=("learned",),
        profile=ProfileConfig(lengths=(0.5,)),
    )
    result = demo.run_demo(config, tmp_path / "out")
    assert set(result["methods"]) == {"dct", "merge"} and result["video"]["height"] == 80
    small = result["learned"]
    assert (small["video"]["frames"], small["video"]["height"], small["video"]["width"]) == (8, 32, 64)
    assert {m: (e["context_tokens_after"], e["channels"]) for m, e in small["methods"].items()} == {
        "learned": (2, 48),
        "dct": (2, 48),
        "merge": (2, 48),
    }
    source = read_clip(video, ClipSpec(32, 64, 8.0, 0.0, 1.0)).frames
    for entry in small["methods"].values():
        memory = read_memory(tmp_path / "out" / entry["file"])
        for row in entry["retrieved"]:
            assert row["psnr_db"] == pytest.approx(psnr(memory.retrieve(row["frame"]), source[row["frame"]]), abs=1e-6)
    assert "contact_sheet_learned.png" in result["files"]
    tables.print_demo(result, tmp_path / "out")
    shown = capfd.readouterr().out
    assert "8 frames of 32x64 at 8 fps" in shown and f"{small['methods']['learned']['mean_psnr_db']:.2f}" in shown


@pytest.mark.parametrize(
    ("options", "learns"),
    [([], True), (["--size", "480x832"], False), (["--fps", "24"], False), (["--seed", "1"], True)],
)
def test_demo_leaves_the_model_out_at_a_size_of_the_users(package, monkeypatch, tmp_path, options, learns):
    asked = []

    def run_demo(config, *_):
        asked.append(config)
        raise UserError("enough")

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert cli.main(["demo", "a.mp4", "-o", str(tmp_path / "out"), *options]) == 2
    (config,) = asked
    assert config.trained == (("learned",) if learns else ()) and (
        config.clip.height,
        config.clip.width,
        config.clip.fps,
    ) == (480, 832, 24.0)
    (package / "demo.safetensors").unlink()
    assert cli.main(["demo", "a.mp4", "-o", str(tmp_path / "out"), *options]) == 2
    assert asked[1].trained == ()


def test_export_in_eight_bits(package, tmp_path, capsys):
    from vidmem_model.vae import load_vae
    from vidmem_model.weights import write_tensors

    run = tmp_path / "run"
    causal = dataclasses.replace(CONFIG.vae, kind="causal")
    model = MemoryModel(dataclasses.replace(CONFIG, vae=causal))
    extra = {"training": {"sampling": {"queries": 2, "history": 6}, "data": {"test": [[1.0, 2.5]]}}}
    save_model(run, model, extra)
    torch.manual_seed(3)
    before = load_vae(causal)
    write_tensors(run / "vae.safetensors", before.state_dict(), {})
    out = tmp_path / "out" / "small.safetensors"
    assert cli.main(["export", str(run), "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    memory, whole = learned.TrainedModel.load(out), learned.TrainedModel.load(run)
    assert (memory.queries, memory.seconds, memory.held_out) == (2, 24 / model.config.fps, [(1.0, 2.5)])
    assert out.stat().st_size < 0.6 * (run / "model.safetensors").stat().st_size
    for small, large in ((memory.model, whole.model), (memory.vae, whole.vae)):
        for name, tensor in large.state_dict().items():
            step = tensor.flatten(1).abs().amax() / 127 if tensor.ndim > 1 else 0.0
            assert (small.state_dict()[name] - tensor).abs().max() <= 0.51 * step
    assert cli.main(["export", str(run), "-o", str(out), "--dtype", "int4"]) == 2
    assert "--dtype must be one of float32, float16, int8, got 'int4'" in capsys.readouterr().err


def test_adapters_alone_are_stored_beside_their_model(package, tmp_path, capsys):
    """Stage II with frozen encoders: a small file that names the model it is to be added to."""
    pytest.importorskip("peft")
    from vidmem_model.model.lora import add_lora, merge_lora, save_lora

    run = tmp_path / "run"
    model = load_model(package / "demo.safetensors")
    add_lora(model, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    run.mkdir()
    save_lora(run / "lora.safetensors", model, {"steps": 7})
    merge_lora(model)
    out = package / "continued.safetensors"
    assert cli.main(["export", str(run), "-o", str(out), "--base", "demo.safetensors"]) == 0
    assert str(out) in capsys.readouterr().out
    stored = load_model(out)
    assert stored.extra == {"steps": 7} and stored.vae_weights == load_model(package / "demo.safetensors").vae_weights
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)
    assert out.stat().st_size < 0.5 * (package / "demo.safetensors").stat().st_size
    half = package / "half.safetensors"
    assert cli.main(["export", str(run), "-o", str(half), "--base", "demo.safetensors", "--dtype", "float16"]) == 0
    assert half.stat().st_size < 0.7 * out.stat().st_size  # adapters of rank 2 are too small for 8 bits
    # The digest that memories carry changes with the model underneath.
    digest = learned.TrainedModel.load(out).digest
    save_model(package / "demo.safetensors", MemoryModel(CONFIG))
    assert learned.TrainedModel.load(out).digest != digest

    assert cli.main(["export", str(run), "-o", str(out), "--base", "none.safetensors"]) == 2
    assert "none.safetensors: no such file" in capsys.readouterr().err
    (package / "demo.safetensors").unlink()
    with pytest.raises(UserError, match="demo.safetensors: no such file"):
        load_model(out)
