"""Bundles of video: reading returns the blocks, at the best quality that fits, without a video decoder."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_helpers import MODEL

from vidmem_model.errors import UserError
from vidmem_model.evaluate.metrics import psnr
from vidmem_model.train.blocks import cut_films
from vidmem_model.train.bundle import read_bundle, write_bundle
from vidmem_model.train.latents import prepare
from vidmem_model.vae import DCTCodec
from vidmem_model.vae.causal import CausalVAE
from vidmem_model.vae.config import CodecConfig
from vidmem_model.video.films import DataConfig

VAE = CausalVAE(MODEL.vae)


def blocks(seed, count=4, height=MODEL.height, width=MODEL.width):
    """Rows and frames: smooth patterns that move, of drawn lengths."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(count):
        length = 4 * draw.randint(4, 9)
        small = torch.rand(1, 3, 6, 9) * 255
        big = torch.nn.functional.interpolate(small, size=(height + length, width), mode="bicubic")[0]
        frames = torch.stack([big[:, i : i + height] for i in range(length)]).permute(0, 2, 3, 1)
        row = {"name": f"00-{number:06d}", "film": "/some/where/film.mkv", "start": 8.0 * number, "frames": length}
        row |= {"scenes": 1, "split": "test" if number % 3 == 2 else "train", "mirrored": False, "zoom": 1.0}
        yield row, frames.clamp(0, 255).to(torch.uint8).contiguous()


def made(tmp_path, seed=0, most=1 << 20, **size):
    path = tmp_path / "film.safetensors"
    return path, write_bundle(path, blocks(seed, **size), MODEL, most)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_read_is_what_was_cut(tmp_path, seed):
    path, told = made(tmp_path, seed)
    found, given = list(read_bundle(path, MODEL, VAE)), list(blocks(seed))
    assert [row for row, _ in found] == [{**row, "film": "film.mkv"} for row, _ in given], "no path of this machine"
    levels = torch.tensor([psnr(frames, true) for (_, frames), (_, true) in zip(found, given, strict=True)])
    assert levels.min() > 45 and abs(levels.mean() - told["psnr"]) < 1
    assert told["frames"] == sum(len(frames) for _, frames in given) == sum(len(frames) for _, frames in found)
    (_, test), *more = read_bundle(path, MODEL, VAE, "test")
    assert not more and torch.equal(test, found[2][1])


def test_a_size_that_is_no_whole_number_of_blocks(tmp_path):
    model = dataclasses.replace(MODEL, height=30, width=44)
    path = tmp_path / "film.safetensors"
    write_bundle(path, blocks(1, height=30, width=44), model, 1 << 20)
    for (_, frames), (_, true) in zip(read_bundle(path, model, VAE), blocks(1, height=30, width=44), strict=True):
        assert frames.shape == true.shape and psnr(frames, true) > 45


def test_fewer_bytes_are_kept_and_lose_more(tmp_path):
    levels = []
    for most in (60_000, 45_000, 35_000):
        path, told = made(tmp_path, 5, most)
        assert path.stat().st_size <= most
        levels.append(told["psnr"])
    assert levels == sorted(levels, reverse=True) and levels[0] > levels[-1] + 1
    with pytest.raises(UserError, match=r"4 blocks of video do not fit into 24,100 bytes; give fewer seconds"):
        made(tmp_path, 5, 24_100)
    with pytest.raises(UserError, match="there are no blocks of video to bundle"):
        write_bundle(tmp_path / "none.safetensors", [], MODEL, 1 << 20)


def test_films_and_bundles_are_cut_alike(tmp_path):
    path, _ = made(tmp_path)
    data = DataConfig(videos=(str(path), str(path)), cache=str(tmp_path / "cache"))
    rows = [row for row, _ in cut_films(data, [path, path], MODEL, VAE)]
    assert len({row["name"] for row in rows}) == 8
    assert [row["split"] for row, _ in cut_films(data, [path], MODEL, VAE, "test")] == ["test"]
    vae = DCTCodec(CodecConfig(8))
    encoded = prepare(dataclasses.replace(data, videos=(str(path),), mirror=True), MODEL, vae)
    assert len(encoded.blocks) == 4 + 3 and len(encoded.split("test").blocks) == 1
    with pytest.raises(UserError, match="data.zooms must be empty for a bundle"):
        next(cut_films(dataclasses.replace(data, zooms=(1.5,)), [path], MODEL, VAE))


@pytest.mark.parametrize("change", [{"height": 64}, {"width": 32}, {"fps": 12.0}])
def test_another_raster_is_refused(tmp_path, change):
    path, _ = made(tmp_path)
    with pytest.raises(UserError, match=r"film.safetensors: was made for \{.*'height': 32.*\}, not for \{.*\}"):
        next(read_bundle(path, dataclasses.replace(MODEL, **change), VAE))


def test_what_is_no_bundle_is_one_line(tmp_path):
    path, _ = made(tmp_path)
    with pytest.raises(UserError, match="none.safetensors: no such file"):
        next(read_bundle(tmp_path / "none.safetensors", MODEL, VAE))
    content, tensors = path.read_bytes(), load_file(path)
    broken = tmp_path / "broken.safetensors"
    draw = random.Random(0)
    for _ in range(20):
        damaged = bytearray(content)
        for place in [draw.randrange(len(damaged)) for _ in range(draw.choice([1, 20]))]:
            damaged[place] = draw.randrange(256)
        broken.write_bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])])
        try:
            list(read_bundle(broken, MODEL, VAE))
        except UserError as error:
            assert str(error).startswith(f"{broken}: ") and "\n" not in str(error)
    save_file(tensors, broken)
    with pytest.raises(
        UserError, match=r"is damaged or not a bundle of video \(not of format vidmem.bundle, version 1\)"
    ):
        next(read_bundle(broken, MODEL, VAE))
