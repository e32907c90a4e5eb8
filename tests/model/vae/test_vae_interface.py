"""The interface of codecs and VAEs: frame counts, padding, streams, scaling, loading."""

import pytest
import torch
from safetensors.torch import save_file

from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.vae import DCTCodec, VideoCodec, frames_to_float, load_vae, pad_frames, rechunk
from vidmem_model.vae.causal import CausalVAE
from vidmem_model.vae.config import CodecConfig, VAEConfig

SMALL = VAEConfig(channels=4, width=8, depth=1)


class Summing(VideoCodec):
    """First latent frame of one video frame; a latent is the sum of all frames so far, so order and cache show."""

    name, channels, first_frames, stride = "summing", 3, 1, (4, 8, 8)

    def encode(self, frames, cache=None):
        cache = {} if cache is None else cache
        start = 0 if cache else 1
        assert (frames.shape[2] - start) % 4 == 0
        total = frames[..., ::8, ::8].cumsum(2) + cache.get("total", 0.0)
        cache["total"] = total[:, :, -1:]
        return total[:, :, (0 if start else 3) :: 4]

    def decode(self, latents, cache=None):
        cache = {} if cache is None else cache
        times = [1 if not cache and i == 0 else 4 for i in range(latents.shape[2])]
        cache["seen"] = True
        frames = latents.repeat_interleave(torch.tensor(times), 2)
        return frames.repeat_interleave(8, -1).repeat_interleave(8, -2)


def film(frames, height=16, width=32):
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8)


def test_counts_of_frames():
    """1 + 4k frames where the first latent frame covers one: 480 frames are padded to 481, 121 latent frames."""
    ours, published = DCTCodec(), Summing()
    assert [ours.latent_frames(n) for n in (0, 1, 4, 5, 480, 481)] == [0, 1, 1, 2, 120, 121]
    assert [published.latent_frames(n) for n in (0, 1, 2, 5, 6, 480, 481)] == [0, 1, 2, 2, 3, 121, 121]
    assert [ours.video_frames(k) for k in (0, 1, 2, 120)] == [0, 4, 8, 480]
    assert [published.video_frames(k) for k in (0, 1, 2, 121)] == [0, 1, 5, 481]
    for codec in (ours, published):
        assert all(codec.latent_frames(codec.video_frames(k)) == k for k in range(9))


def test_pad_rule_with_a_short_first_latent_frame():
    frames = frames_to_float(film(7, 9, 17))
    padded = pad_frames(frames, (4, 16, 16), first=1)
    assert padded.shape == (1, 3, 9, 16, 32)
    assert torch.equal(padded[:, :, :7, :9, :17], frames)
    assert torch.equal(padded[:, :, 8, :9, :17], frames[:, :, 6])
    assert pad_frames(frames, (3, 9, 17), first=1) is frames
    assert pad_frames(frames[:, :, :2], (4, 9, 17), first=4).shape[2] == 4


def test_rechunk_with_another_first_length():
    items = torch.arange(17)
    for pieces in ([17], [5, 12], [1] * 17, [16, 1], [0, 17]):
        chunks = list(rechunk(items.split(pieces), 4, 0, first=3))
        assert [len(c) for c in chunks] == [3, 4, 4, 4, 2]
        assert torch.equal(torch.cat(chunks), items)
    assert [len(c) for c in rechunk([items[:2]], 4, 0, first=3)] == [2]


@pytest.mark.parametrize("pieces", [[14], [1] * 14, [5, 9], [6, 8], [4, 4, 6]])
def test_chunks_carry_the_cache(pieces):
    codec = Summing()
    frames = film(14)
    whole = codec.encode(pad_frames(frames_to_float(frames), (4, 16, 16), first=1))
    chunks = list(codec.encode_chunks(frames.split(pieces)))
    assert [c.shape[2] for c in chunks] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(chunks, 2), whole)
    decoded = torch.cat(list(codec.decode_chunks(chunks, (14, 15, 30))), 2)
    assert torch.equal(decoded, codec.decode(torch.cat(chunks, 2))[:, :, :14, :15, :30])


def test_causal_vae_streams_through_the_interface():
    vae = load_vae(SMALL)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    frames = film(22)
    chunks = list(vae.encode_chunks(frames.split([3, 12, 7])))
    whole = vae.encode(pad_frames(frames_to_float(frames), (4, 16, 16)))
    torch.testing.assert_close(torch.cat(chunks, 2), whole, atol=1e-4, rtol=1e-4)
    alone = torch.cat([vae.encode(pad_frames(frames_to_float(f), (4, 16, 16))) for f in frames.split(8)], 2)
    assert not torch.allclose(alone, whole, atol=1e-2)  # the cache matters
    decoded = torch.cat(list(vae.decode_chunks(chunks, (22, 16, 32))), 2)
    torch.testing.assert_close(decoded, vae.decode(whole)[:, :, :22], atol=1e-4, rtol=1e-4)
    assert not whole.requires_grad and not vae.training


def test_dct_scale_brings_film_like_frames_to_unit_variance():
    codec = load_vae(VAEConfig(kind="dct", channels=16))
    assert codec.channels == 16
    torch.testing.assert_close(codec.latent_std[[0, 1, 7, 8]], torch.tensor([12.0, 3.7 / 2**1.5, 6.0, 3.0]))
    latents = codec.encode(torch.rand(1, 3, 8, 16, 16) * 2 - 1)
    torch.testing.assert_close(codec.unscale(codec.scale(latents)), latents)
    torch.testing.assert_close(codec.scale(latents)[:, 1], latents[:, 1] * 2**1.5 / 3.7)
    ours = DCTCodec(CodecConfig(2), latent_std=torch.tensor([2.0, 4.0]))
    assert torch.equal(ours.scale(torch.full((1, 2, 1, 1, 1), 8.0)).flatten(), torch.tensor([4.0, 2.0]))
    with pytest.raises(ValueError, match="latent_std must be 2 positive numbers"):
        DCTCodec(CodecConfig(2), latent_std=torch.tensor([1.0, 0.0]))


def test_scale_of_a_codec_without_its_own_is_the_identity():
    latents = torch.randn(1, 3, 2, 4, 4)
    assert torch.equal(Summing().scale(latents), latents) and torch.equal(Summing().unscale(latents), latents)
    assert Summing().device == DCTCodec().device == torch.device("cpu")
    assert CausalVAE(SMALL).to("meta").device == torch.device("meta")


def test_load_vae_reads_a_causal_vae(tmp_path):
    first = CausalVAE(SMALL)
    torch.nn.init.normal_(first.decoder_out.weight)
    first.latent_std.fill_(2.0)
    save_file({k: v.half() for k, v in first.state_dict().items()}, tmp_path / "vae.safetensors")
    vae = load_vae(SMALL, tmp_path / "vae.safetensors")
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in vae.parameters())
    torch.testing.assert_close(vae.decoder_out.weight, first.decoder_out.weight, atol=1e-3, rtol=1e-3)
    assert torch.equal(vae.scale(torch.ones(1, 4, 1, 1, 1)), torch.full((1, 4, 1, 1, 1), 0.5))
    with pytest.raises(UserError, match="does not hold the weights of this model's VAE"):
        load_vae(VAEConfig(channels=4, width=16, depth=1), tmp_path / "vae.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(MemoryFormatError, match="is damaged"):
        load_vae(SMALL, tmp_path / "damaged.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_vae(SMALL, tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="dct has no weights"):
        load_vae(VAEConfig(kind="dct"), tmp_path / "vae.safetensors")
    with pytest.raises(UserError, match="dct has stride"):
        load_vae(VAEConfig(kind="dct", stride=(4, 16, 16)))
