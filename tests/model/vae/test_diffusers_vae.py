"""The adapters to diffusers' VAEs, with small random weights: what they give is what diffusers gives."""

import json
import sys

import pytest
import torch

from vidmem_model.errors import UserError
from vidmem_model.vae import load_vae, pad_frames
from vidmem_model.vae.config import VAEConfig

diffusers = pytest.importorskip("diffusers")

WAN = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "latents_mean": [0.5, -0.5, 0.0, 1.0],
    "latents_std": [2.0, 1.0, 0.5, 4.0],
}
# Wan 2.2: residual blocks, pixels in patches of 2x2 before the encoder.
WAN22 = {**WAN, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
HUNYUAN = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.25,
}
KINDS = {
    "wan": ("AutoencoderKLWan", WAN, VAEConfig("wan", 4)),
    "wan 2.2": ("AutoencoderKLWan", WAN22, VAEConfig("wan", 4, (4, 16, 16))),
    "hunyuan": ("AutoencoderKLHunyuanVideo", HUNYUAN, VAEConfig("hunyuan", 4)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each VAE's folder as save_pretrained writes it."""
    made = {}
    for kind, (name, sizes, _) in KINDS.items():
        torch.manual_seed(1)
        made[kind] = tmp_path_factory.mktemp(kind.replace(" ", ""))
        getattr(diffusers, name)(**sizes).save_pretrained(made[kind])
    return made


@pytest.fixture(params=KINDS)
def pair(request, folders):
    """The adapter, and the same model loaded by diffusers itself."""
    name, _, config = KINDS[request.param]
    return load_vae(config, folders[request.param]), getattr(diffusers, name).from_pretrained(folders[request.param])


def clip(frames, height=32, width=32):
    """Random but smooth frames (1, 3, T, H, W) in [-1, 1]."""
    coarse = torch.randn(1, 3, frames, height // 8, width // 8)
    return torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear").tanh()


@torch.no_grad()
def test_equals_diffusers_called_directly(pair):
    ours, theirs = pair
    frames = clip(9)
    latents = ours.encode(frames)
    cells = [32 // s for s in ours.stride[1:]]
    assert latents.shape == (1, 4, 3, *cells) and latents.dtype == torch.float32
    assert torch.equal(latents, theirs.encode(frames).latent_dist.mean)
    decoded = ours.decode(latents)
    assert decoded.shape == frames.shape
    assert torch.equal(decoded, theirs.decode(latents).sample)
    assert not latents.requires_grad and not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_scale_is_the_published_one(pair):
    ours, theirs = pair
    latents = torch.randn(2, 4, 3, 2, 2)
    if ours.name == "wan":
        mean, std = (torch.tensor(getattr(theirs.config, n)).view(4, 1, 1, 1) for n in ("latents_mean", "latents_std"))
        expected = (latents - mean) / std
    else:
        expected = latents * theirs.config.scaling_factor
    torch.testing.assert_close(ours.scale(latents), expected)
    torch.testing.assert_close(ours.unscale(ours.scale(latents)), latents)


def test_counts_of_frames(pair):
    ours, _ = pair
    assert ours.first_frames == 1
    assert [ours.latent_frames(n) for n in (1, 2, 5, 480, 481)] == [1, 2, 2, 121, 121]
    assert pad_frames(torch.empty(1, 3, 480, 1, 1), (4, 1, 1), ours.first_frames).shape[2] == 481


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "wan 2.2"])
def test_wan_streams_equal_the_whole(kind, folders):
    vae = load_vae(KINDS[kind][2], folders[kind])
    frames = clip(17)
    whole = vae.encode(frames)
    video = vae.decode(whole)
    for cuts in ([1, 4, 4, 4, 4], [5, 8, 4], [9, 8], [17]):
        cache = {}
        pieces = [vae.encode(piece, cache) for piece in frames.split(cuts, 2)]
        assert [p.shape[2] for p in pieces] == [vae.latent_frames(cuts[0])] + [n // 4 for n in cuts[1:]]
        torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-5, rtol=1e-5)
    for cuts in ([1, 1, 1, 1, 1], [2, 3], [5]):
        cache = {}
        pieces = [vae.decode(piece, cache) for piece in whole.split(cuts, 2)]
        torch.testing.assert_close(torch.cat(pieces, 2), video, atol=1e-5, rtol=1e-5)
    alone = vae.encode(frames[:, :, 8:])[:, :, 1:]
    assert (alone - whole[:, :, 3:]).abs().max() > 1e-3  # without the cache it is another stream


@torch.no_grad()
def test_hunyuan_streams_behind_an_overlap(folders):
    """The first piece is exact; a later one is what diffusers gives for the piece behind its overlap."""
    vae = load_vae(KINDS["hunyuan"][2], folders["hunyuan"])
    frames = clip(13)
    cache = {}
    pieces = [vae.encode(piece, cache) for piece in frames.split([5, 4, 4], 2)]
    assert [p.shape[2] for p in pieces] == [2, 1, 1]
    assert torch.equal(pieces[0], vae.encode(frames[:, :, :5]))
    assert torch.equal(pieces[1], vae.encode(frames[:, :, :9])[:, :, 2:])
    assert torch.equal(pieces[2], vae.encode(frames[:, :, 4:])[:, :, 2:])
    whole = vae.encode(frames)
    cache = {}
    video = torch.cat([vae.decode(piece, cache) for piece in whole.split([2, 1, 1], 2)], 2)
    assert video.shape == frames.shape
    assert torch.equal(video[:, :, :5], vae.decode(whole[:, :, :2]))
    assert torch.equal(video[:, :, 9:], vae.decode(whole[:, :, 1:])[:, :, 5:])


@torch.no_grad()
def test_chunks_of_uint8_frames(pair):
    ours, _ = pair
    frames = torch.randint(0, 256, (7, 20, 32, 3), dtype=torch.uint8)
    chunks = list(ours.encode_chunks(frames.split(3)))
    assert [c.shape[2] for c in chunks] == [2, 1]
    decoded = list(ours.decode_chunks(chunks, (7, 20, 32)))
    assert [f.shape[2] for f in decoded] == [5, 2] and decoded[0].shape[3:] == (20, 32)


def test_bad_input_is_refused(pair):
    ours, _ = pair
    for shape in ((1, 3, 4, 32, 32), (1, 3, 5, 20, 32), (1, 4, 5, 32, 32), (3, 5, 32, 32), (1, 3, 0, 32, 32)):
        with pytest.raises(ValueError, match=r"encode: frames must be \(B, 3, 1 \+ 4k, .* got"):
            ours.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"encode: frames must be \(B, 3, 4k, "):
        ours.encode(torch.zeros(1, 3, 5, 32, 32), {"a stream": True})
    with pytest.raises(ValueError, match=r"decode: latents must be \(B, 4, T, H, W\)"):
        ours.decode(torch.zeros(1, 3, 1, 2, 2))


def test_what_the_user_can_get_wrong(folders, tmp_path, monkeypatch):
    wan, hunyuan = KINDS["wan"][2], KINDS["hunyuan"][2]
    with pytest.raises(UserError, match="AutoencoderKLWan; give the folder"):
        load_vae(wan)
    with pytest.raises(UserError, match=r"config\.json: cannot be read \(No such file"):
        load_vae(wan, tmp_path)
    with pytest.raises(UserError, match="must hold the VAE AutoencoderKLHunyuanVideo, got AutoencoderKLWan"):
        load_vae(hunyuan, folders["wan"])
    with pytest.raises(UserError, match=r"has 4 channels and stride \(4, 8, 8\), the model asks for 16 and"):
        load_vae(VAEConfig("wan"), folders["wan"])
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(UserError, match="is not the configuration of a diffusers model"):
        load_vae(wan, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", **WAN}))
    with pytest.raises(UserError, match="the weights of AutoencoderKLWan cannot be read"):
        load_vae(wan, tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="needs diffusers: pip install"):
        load_vae(wan, folders["wan"])


def test_a_pipelines_folder_will_do(folders, tmp_path):
    (tmp_path / "vae").symlink_to(folders["wan"])
    vae = load_vae(KINDS["wan"][2], tmp_path)
    frames = clip(5)
    with torch.no_grad():
        assert torch.equal(vae.encode(frames), load_vae(KINDS["wan"][2], folders["wan"]).encode(frames))
