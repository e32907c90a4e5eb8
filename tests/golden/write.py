"""Wrote the golden files, at commit 22d47fd: python tests/golden/write.py, PYTHONPATH being the tree, python and
what is now tests/helpers.

Kept to tell how they came about. It is not to be run over them again, and refuses to: they are what the code of that
day wrote. Files of a later day get a writer of their own, and names that are not taken. The recipes and captions in
this folder were written by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import av
import pytest
import torch
import yaml
from golden_helpers import (
    BANKS,
    GOLDEN,
    MEMORIES,
    MODELS,
    RECIPES,
    RUNS,
    curve,
    digest,
    of_bank,
    of_checkpoint,
    of_memory,
    of_model,
    plain,
    use_golden_models,
)
from safetensors.torch import load_file, save_file

from vidmem_kernels import MemoryBank
from vidmem_model.memory.compressor import compress
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.file import write_memory
from vidmem_model.memory.method import encoded
from vidmem_model.model.config import PRESETS, Compression, DiTConfig, EncoderConfig, ModelConfig, TextConfig
from vidmem_model.model.file import save_model
from vidmem_model.model.lora import add_lora, attach_lora, save_lora
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.train.continuation import finetune
from vidmem_model.train.distributed import Interrupted
from vidmem_model.train.loop import FlowMatching
from vidmem_model.train.recipe import read_finetune, read_pretrain, read_pretrain_vae
from vidmem_model.train.retrieval import pretrain
from vidmem_model.train.vae import pretrain_vae
from vidmem_model.train.vae_loss import Reconstruction
from vidmem_model.vae import DCTCodec
from vidmem_model.vae.config import CodecConfig, VAEConfig
from vidmem_model.video import Clip

TRAINING = GOLDEN / "training"
STOP = 3
STAGES = {
    "vae": lambda: pretrain_vae(read_pretrain_vae(Path("vae.yaml"))),
    "one": lambda: pretrain(read_pretrain(Path("one.yaml"))),
    "two": lambda: finetune(read_finetune(Path("two.yaml"))),
}
# All that the preset does without.
SMALL = ModelConfig(
    vae=VAEConfig(kind="dct", channels=4),
    text=TextConfig(dim=8, max_tokens=6, vocabulary=16),
    encoders=(
        EncoderConfig(compression=Compression(2, 2, 2), channels=(4, 8), attention="causal", heads=2, shortcut=12),
        EncoderConfig(compression=Compression(4, 2, 2), branches="lr", channels=(4, 8), attention="none", heads=2),
        EncoderConfig(compression=Compression(2, 2, 2), branches="patchifier"),
        EncoderConfig(compression=Compression(2, 2, 2), branches="merge"),
        EncoderConfig(compression=Compression(2, 2, 2), branches="sparse"),
    ),
    dit=DiTConfig(
        dim=16,
        depth=2,
        heads=2,
        mlp=24,
        prediction="sample",
        unfold=16,
        memory_cross_attention=True,
        linear_blocks=(1,),
        window=1,
    ),
    height=32,
    width=64,
    fps=8.0,
    shift=3.0,
)


def film() -> torch.Tensor:
    """Three scenes of 3 s at 8 frames a second, a disc and a striped floor that move: uint8 (72, 32, 64, 3)."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    skies = [(40, 90, 160), (150, 120, 60), (60, 140, 70)]
    discs = [(230, 60, 40), (40, 60, 220), (240, 230, 90)]
    shown = []
    for i in range(72):
        scene = i // 24
        image = torch.stack([c + rows * k // 8 for k, c in enumerate(skies[scene], 1)], -1)
        inside = (rows - 8 - 3 * i % 11).square() + (columns - (5 + 2 * (i % 24) + 17 * scene) % 64).square() < 36
        image[inside] = torch.tensor(discs[scene])
        image[24 + scene :, (columns[0] + 3 * i) % 16 < 5] = 20
        shown.append(image.to(torch.uint8))
    return torch.stack(shown)


def write_film(path: Path) -> None:
    """Without loss, in RGB: every decoder gives the same frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8, options={"level": "3", "coder": "1", "context": "1", "g": "72"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "bgr0"
        for image in film():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.numpy(), format="rgb24")))
        container.mux(stream.encode(None))


def write_banks() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in BANKS:
        bank = MemoryBank(20, dtype=getattr(torch, dtype))
        # Rows of all sizes, one of zeros, and one with a number that is tiny beside the others.
        tokens = torch.randn(24, 20, generator=generator) * torch.logspace(-3, 3, 24)[:, None]
        tokens[5] = 0.0
        tokens[6, 3] = 1e-6
        bank.append(tokens[:17], torch.rand(17, 3, generator=generator) * 100)
        bank.append(tokens[17:], torch.rand(7, 3, generator=generator) * 100)
        extras = {
            "half": torch.randn(3, 2, generator=generator).half(),
            "brain": torch.randn(5, generator=generator).bfloat16(),
            "double": torch.randn(2, 1, 2, generator=generator).double(),
            "long": torch.tensor([2**40, -1]),
            "small": torch.tensor([[-128, 127]], dtype=torch.int8),
            "byte": torch.arange(7, dtype=torch.uint8),
            "flags": torch.tensor([True, False, True]),
            "nothing": torch.empty(0, 4),
        }
        bank.save(GOLDEN / "banks" / f"{dtype}.safetensors", {"name": "Zürich, 冬", "empty": ""}, extras)


def stopped(name: str) -> None:
    """Run a stage and interrupt it in step STOP, as Ctrl-C does."""
    module = Reconstruction if name == "vae" else FlowMatching
    forward, calls = module.forward, []

    def interrupting(self, batch):
        calls.append(1)
        if len(calls) == STOP:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    module.forward = interrupting
    try:
        STAGES[name]()
        raise AssertionError("the run was to be stopped")
    except Interrupted as stop:
        assert stop.step == STOP
    finally:
        module.forward = forward


def write_runs() -> None:
    """Every run stopped; then, in a copy, the same run in one piece, and the stopped one to its end."""
    write_film(TRAINING / "film.mkv")
    finished = TRAINING / "finished"
    finished.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        for name, result in RUNS.items():
            ends = {}
            for case in ("whole", "stopped"):
                folder = shutil.copytree(TRAINING, Path(scratch) / f"{name}-{case}")
                os.chdir(folder)
                if case == "stopped":
                    stopped(name)
                    EXPECTED[f"training/{name}"] = of_checkpoint(folder / name / "checkpoints" / f"step-{STOP:08d}")
                    shutil.make_archive(str(TRAINING / name), "zip", folder, name)
                STAGES[name]()
                ends[case] = digest(load_file(folder / name / result)), curve(folder / name)
            assert ends["whole"] == ends["stopped"], name
            shutil.copyfile(folder / name / result, finished / f"{name}.safetensors")
            EXPECTED[f"training/{name}"] = {"curve": ends["whole"][1], "checkpoint": EXPECTED[f"training/{name}"]}
        os.chdir(GOLDEN)


def write_memories() -> None:
    clip = Clip(film()[:12], 8.0, Path("film.mkv"), None)
    for name in MEMORIES:
        method, dtype = name.split("-")
        if method == "learned":
            made = compress(clip, CompressorConfig(method, dtype=dtype, model="one"))
        else:
            given = {"channels": 128} if method == "dct" else {"budget": 10}
            config = CompressorConfig(method=method, compression=Compression(2, 1, 1), dtype=dtype, **given)
            made = compress(encoded(clip, DCTCodec(CodecConfig(48)), torch.float32), config)
        write_memory(GOLDEN / "memories" / f"{name}.safetensors", made)


def with_random_weights(config: ModelConfig) -> MemoryModel:
    torch.manual_seed(2)
    model = MemoryModel(config)
    for weight in model.parameters():  # a new model's last layers are zero
        torch.nn.init.normal_(weight, std=0.1)
    return model


def write_models() -> None:
    folder = GOLDEN / "models"
    tiny, small = with_random_weights(PRESETS["tiny"]), with_random_weights(SMALL)
    save_model(folder / "tiny.safetensors", tiny, {"note": "random weights"}, dtype="int8")
    save_model(folder / "small.safetensors", small, {"note": "random weights"}, dtype="float16")
    add_lora(tiny, rank=2, alpha=3)
    for name, weight in tiny.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    with tempfile.TemporaryDirectory() as scratch:
        adapters = Path(scratch) / "lora.safetensors"
        save_lora(adapters, tiny, {"note": "random adapters"})
        attach_lora(adapters, folder / "tiny_continue.safetensors", "tiny.safetensors", "float16")


def every_key(name: str, recipe: dict, parsed: dict) -> None:
    """A recipe names every key that its configuration has."""

    def keys(value, where=""):
        if isinstance(value, dict):
            return {k for key, inner in value.items() for k in keys(inner, f"{where}.{key}")}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {k for inner in value for k in keys(inner, where)}
        return {where}

    if name == "pretrain_vae":  # its model is a preset with changes
        recipe, parsed = {**recipe, "model": None}, {**parsed, "model": None}
    given = {k.replace(".from", ".start") for k in keys(recipe)}
    assert given == keys(parsed), (name, given ^ keys(parsed))


EXPECTED: dict = {}


def main() -> None:
    if (GOLDEN / "expected.json").exists() or (GOLDEN / "banks").exists():
        raise SystemExit(f"{GOLDEN}: holds the golden files; they are never written again")
    for folder in ("banks", "memories", "models"):
        (GOLDEN / folder).mkdir()
    tensors: dict[str, torch.Tensor] = {}
    write_banks()
    write_runs()
    with pytest.MonkeyPatch.context() as patch:
        use_golden_models(patch)
        write_memories()
        for name in MEMORIES:
            file = GOLDEN / "memories" / f"{name}.safetensors"
            EXPECTED[f"memories/{name}"], tensors[f"memories/{name}.frame"] = of_memory(file)
    write_models()
    for name in BANKS:
        bank = MemoryBank.load(GOLDEN / "banks" / f"{name}.safetensors")
        EXPECTED[f"banks/{name}"] = bank.metadata
        exact, close = of_bank(bank)
        tensors |= {f"banks/{name}.{key}": value for key, value in (exact | close).items()}
    for name in MODELS:
        about, close, weights = of_model(GOLDEN / "models" / f"{name}.safetensors")
        EXPECTED[f"models/{name}"] = {**about, "weights": weights}
        tensors |= {f"models/{name}.{key}": value for key, value in close.items()}
    os.chdir(GOLDEN / "recipes")
    for name, read in RECIPES.items():
        parsed = plain(read(Path(f"{name}.yaml")))
        every_key(name, yaml.safe_load(Path(f"{name}.yaml").read_text()), parsed)
        EXPECTED[f"recipes/{name}"] = parsed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, GOLDEN / "expected.safetensors")
    text = json.dumps(EXPECTED, indent=1, ensure_ascii=False)
    (GOLDEN / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
