"""The small causal VAE: its linear start, causality, streaming, batches and loss."""

from __future__ import annotations

import math

import pytest
import torch

from vidmem_model.train.vae_loss import Clips, ClipSampler, Reconstruction, measure_latents
from vidmem_model.vae import frames_to_float
from vidmem_model.vae.causal import CausalVAE
from vidmem_model.vae.config import VAEConfig

TINY = VAEConfig(channels=5, stride=(2, 4, 4), width=8, depth=2)


def random_vae(config=TINY, seed=0):
    """A VAE in which every layer has an effect, as after training."""
    torch.manual_seed(seed)
    vae = CausalVAE(config).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


def film(frames=12, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, frames // 2, height // 4, width // 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return (smooth[0].permute(1, 2, 3, 0) * 255).to(torch.uint8)


def test_starts_as_the_principal_components():
    config = VAEConfig(channels=3 * 2 * 4 * 4, stride=(2, 4, 4), width=8, depth=1)
    vae = CausalVAE(config)
    frames = torch.rand(4, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae.start_from(frames)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(vae.encode(frames)), frames, atol=1e-4, rtol=0)
        small = CausalVAE(VAEConfig(channels=7, stride=(2, 4, 4), width=8, depth=1))
        small.start_from(frames)
        error = (small.decode(small.encode(frames)) - frames).square().sum() / (frames.numel() / 96)
    blocks = vae._blocks(frames).reshape(-1, 96).double()
    lost = torch.linalg.eigvalsh(torch.cov(blocks.T, correction=0))[: 96 - 7].sum()
    assert error.item() == pytest.approx(lost.item(), rel=1e-3)


@pytest.mark.parametrize("cuts", [[2, 4, 6], [12], [4, 8], [2, 2, 2, 2, 2, 2]])
def test_a_stream_equals_the_whole(cuts):
    vae = random_vae()
    frames = frames_to_float(film())[:, :, : sum(cuts)]
    with torch.no_grad():
        whole = vae.encode(frames)
        back = vae.decode(whole)
        into, out, latents, parts = {}, {}, [], []
        for piece in frames.split(cuts, dim=2):
            latents.append(vae.encode(piece, into))
            parts.append(vae.decode(latents[-1], out))
    torch.testing.assert_close(torch.cat(latents, 2), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(parts, 2), back, atol=1e-5, rtol=1e-5)


def test_the_future_is_not_seen():
    vae = random_vae()
    frames = frames_to_float(film())
    changed = frames.clone()
    changed[:, :, 6:] = torch.rand(changed[:, :, 6:].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = vae.encode(frames), vae.encode(changed)
        assert torch.equal(before[:, :, :3], after[:, :, :3])
        assert (before[:, :, 3:] - after[:, :, 3:]).abs().amin(dim=(0, 1, 3, 4)).gt(0).all()
        assert torch.equal(vae.decode(before)[:, :, :6], vae.decode(after)[:, :, :6])


def test_scale_brings_the_training_latents_to_unit_variance():
    vae = random_vae()
    blocks = tuple(film(seed=s) for s in range(3))
    measure_latents(vae, blocks, frames=12)
    with torch.no_grad():
        latents = torch.cat([vae.encode(frames_to_float(b)) for b in blocks])
    scaled = vae.scale(latents)
    variance, mean = torch.var_mean(scaled, dim=(0, 2, 3, 4))
    assert variance.mean().item() == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(variance, latents.var(dim=(0, 2, 3, 4)) / vae.latent_std[0].square())
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.unscale(scaled), latents, atol=1e-5, rtol=1e-5)


def test_clips_depend_on_seed_step_and_sample_only():
    blocks = (film(20, seed=1), film(6, seed=2), film(16, seed=3))
    vae = CausalVAE(TINY)
    sampler = ClipSampler(blocks, vae, frames=8, seed=5)
    first = [sampler(step, range(3)) for step in range(12)]
    again = ClipSampler(blocks, vae, frames=8, seed=5)
    for step in reversed(range(12)):
        one, two = again(step, [0]), again(step, [1, 2])
        assert torch.equal(torch.cat([one.frames, two.frames]), first[step].frames)
        assert torch.equal(torch.cat([one.noise, two.noise]), first[step].noise)
    assert not torch.equal(first[0].frames, ClipSampler(blocks, vae, frames=8, seed=6)(0, range(3)).frames)
    sizes = {(tuple(clips.frames.shape), tuple(clips.noise.shape)) for clips in first}
    large, small = ((3, 3, 8, 8, 12), (3, 5, 4, 2, 3)), ((3, 3, 8, 2, 3), (3, 5, 4, 0, 0))
    assert sizes == {large, small}, "large and small clips both come up"
    stretches = [frames_to_float(b) for b in (blocks[0], blocks[2])]  # the second block is too short
    for clip in next(c.frames for c in first if c.frames.shape[-1] == 12):
        assert any(
            torch.equal(stretch[0, :, s : s + 8], clip) or torch.equal(stretch[0, :, s : s + 8].flip(-1), clip)
            for stretch in stretches
            for s in range(stretch.shape[2] - 7)
        )
    with pytest.raises(ValueError, match="at least 32 frames, got 3 shorter ones"):
        ClipSampler(blocks, vae, frames=32)


def test_loss_of_a_known_error():
    vae = CausalVAE(TINY)
    with torch.no_grad():
        for layer in (vae.to_latent, vae.from_latent):
            layer.weight.zero_()
            layer.bias.zero_()
        vae.encoder_out.bias.zero_()  # posterior: mean 0, variance 1, so no divergence
    frames = torch.full((2, 3, 4, 8, 8), 0.5)
    frames[..., 4:] = -0.5  # the reconstruction is 0 everywhere: the error is 0.5, its one edge 1.0
    clips = Clips(frames, torch.randn(2, 5, 2, 2, 2, generator=torch.Generator().manual_seed(0)))
    loss = Reconstruction(vae)
    assert loss(clips).item() == pytest.approx(0.5 + 2.0 * 0.25 + 0.5 * (1.0 / 7), rel=1e-5)
    with torch.no_grad():
        vae.encoder_out.bias[TINY.channels :] = -2.0
    more = 1e-4 * 0.5 * (math.exp(-2.0) - 1.0 + 2.0)
    assert loss(clips).item() == pytest.approx(0.5 + 0.5 + 0.5 / 7 + more, rel=1e-5)
    with torch.no_grad():
        vae.from_latent.weight.fill_(1.0)
    # Every pixel is now the sum of its latents' noise, whose deviation is exp(-2 / 2).
    noisy = vae._frames((clips.noise * math.exp(-1.0)).sum(1)[..., None].expand(-1, -1, -1, -1, 3 * 2 * 4 * 4))
    error = noisy - frames
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    expected = error.abs().mean() + 2.0 * error.square().mean() + 0.5 * edges + more
    assert loss(clips).item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_parameter_learns():
    vae = random_vae()
    sampler = ClipSampler([film()], vae, frames=4)
    Reconstruction(vae)(next(c for c in (sampler(s, range(2)) for s in range(9)) if c.noise.numel())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_wrong_shapes_are_refused():
    vae = CausalVAE(TINY)
    with pytest.raises(ValueError, match=r"encode: frames must be .* whole blocks of \(2, 4, 4\), got"):
        vae.encode(torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"decode: latents must be \(B, 5, T, H, W\), got \(1, 4, 1, 2, 2\)"):
        vae.decode(torch.zeros(1, 4, 1, 2, 2))
