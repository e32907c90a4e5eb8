"""The DCT codec: values, exactness, streaming; patchify; padding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vidmem_model.vae import (
    DCTCodec,
    dct_matrix,
    frames_to_float,
    frames_to_uint8,
    pad_frames,
    patchify,
    rechunk,
    unpatchify,
)
from vidmem_model.vae.config import CodecConfig


def random_frames(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_dct_matrix_is_the_textbook_formula_and_orthonormal():
    for n in (1, 3, 4, 8, 13):
        matrix = dct_matrix(n)
        for k, i in itertools.product(range(n), range(n)):
            norm = math.sqrt((1 if k == 0 else 2) / n)
            value = norm * math.cos(math.pi * (2 * i + 1) * k / (2 * n))
            assert matrix[k, i].item() == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64))


def test_one_block_equals_the_fourfold_sum():
    scipy_fft = pytest.importorskip("scipy.fft")
    frames = random_frames(1, 3, 4, 8, 8)
    latents = DCTCodec().encode(frames).flatten()
    expected = scipy_fft.dctn(frames[0].double().numpy(), norm="ortho").reshape(-1)
    order = DCTCodec()._order
    torch.testing.assert_close(latents.double(), torch.from_numpy(expected)[order], atol=1e-5, rtol=0)


def test_shape_and_exact_inverse():
    frames = random_frames(2, 3, 8, 24, 40)
    codec = DCTCodec()
    latents = codec.encode(frames)
    assert latents.shape == (2, 768, 2, 3, 5)
    assert (codec.decode(latents) - frames).abs().max() < 1e-5


def test_parseval():
    frames = random_frames(1, 3, 4, 16, 16)
    latents = DCTCodec().encode(frames)
    assert latents.square().sum().item() == pytest.approx(frames.square().sum().item(), rel=1e-5)


def test_grey_frames_need_one_channel():
    frames = torch.full((1, 3, 4, 8, 16), 0.25)
    codec = DCTCodec(CodecConfig(channels=1))
    latents = codec.encode(frames)
    torch.testing.assert_close(latents, torch.full((1, 1, 1, 1, 2), 0.25 * math.sqrt(768)))
    torch.testing.assert_close(codec.decode(latents), frames)


def test_fewer_channels_keep_the_lowest_frequencies():
    t, h, w = torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    smooth = torch.stack([h + 0.2 * t, w - 0.3 * t, 0.5 * (h + w)])[None] - 0.5
    whole = DCTCodec().encode(smooth)
    error = []
    for channels in (32, 96, 384):
        codec = DCTCodec(CodecConfig(channels=channels))
        torch.testing.assert_close(codec.encode(smooth), whole[:, :channels])
        error.append((codec.decode(codec.encode(smooth)) - smooth).square().mean().item())
    assert error[0] > error[1] > error[2]
    assert error[0] < 1e-3
    # The energy of a linear transform's dropped channels is the error it makes.
    lost = whole[:, 384:].square().sum().item() / smooth.numel()
    assert error[2] == pytest.approx(lost, rel=1e-3)


def test_codec_refuses_what_does_not_fit():
    codec = DCTCodec()
    for shape in ((1, 3, 5, 8, 8), (1, 3, 4, 8, 9), (1, 1, 4, 8, 8), (3, 4, 8, 8)):
        with pytest.raises(ValueError, match="whole blocks"):
            codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="latents must be"):
        codec.decode(torch.zeros(1, 16, 1, 1, 1))
    for channels in (0, 769, 1.5, True):
        with pytest.raises(ValueError, match="channels must be in"):
            CodecConfig(channels=channels)


@pytest.mark.parametrize("pieces", [[13], [1] * 13, [3, 10], [8, 5], [4, 4, 4, 1]])
def test_streaming_equals_the_whole_however_the_frames_arrive(pieces):
    frames = torch.randint(0, 256, (13, 21, 35, 3), dtype=torch.uint8)
    codec = DCTCodec()
    chunks = list(codec.encode_chunks(frames.split(pieces)))
    assert [c.shape[2] for c in chunks] == [2, 2]
    whole = codec.encode(pad_frames(frames_to_float(frames), (4, 16, 16)))
    torch.testing.assert_close(torch.cat(chunks, 2), whole, atol=1e-5, rtol=1e-5)
    decoded = torch.cat(list(codec.decode_chunks(chunks, (13, 21, 35))), 2)
    assert torch.equal(frames_to_uint8(decoded), frames)


def test_encode_chunks_gives_the_dtype_asked_for():
    frames = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    (chunk,) = DCTCodec().encode_chunks([frames.numpy()], torch.float16)
    assert chunk.dtype == torch.float16
    assert torch.equal(frames_to_uint8(DCTCodec().decode(chunk)), frames)


def test_pad_rule_repeats_the_last_frame_row_and_column():
    frames = random_frames(1, 3, 3, 5, 7)
    padded = pad_frames(frames, (4, 8, 8))
    assert padded.shape == (1, 3, 4, 8, 8)
    assert torch.equal(padded[:, :, :3, :5, :7], frames)
    assert torch.equal(padded[:, :, 3, :5, :7], frames[:, :, 2])
    assert torch.equal(padded[:, :, :3, 7, :7], frames[:, :, :, 4])
    assert torch.equal(padded[:, :, :3, :5, 7], frames[..., 6])
    assert pad_frames(frames, (3, 5, 7)) is frames


def test_float_and_uint8_frames_match():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    as_float = frames_to_float(every)
    assert as_float.min() == -1 and as_float.max() == 1
    assert torch.equal(frames_to_uint8(as_float), every)
    assert frames_to_uint8(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1, 1)).tolist() == [[[[0, 128, 255]]]]


def test_rechunk():
    items = torch.arange(17)
    for pieces in ([17], [5, 12], [1] * 17, [16, 1], [0, 17]):
        chunks = list(rechunk(items.split(pieces), 4, 0))
        assert [len(c) for c in chunks] == [4, 4, 4, 4, 1]
        assert torch.equal(torch.cat(chunks), items)
    assert list(rechunk([], 4, 0)) == []


def test_patchify_orders_channel_then_cell_and_inverts():
    latents = torch.arange(2 * 5 * 3 * 4 * 6.0).view(2, 5, 3, 4, 6)
    tokens, grid = patchify(latents)
    assert grid == (3, 2, 3) and tokens.shape == (2, 18, 20)
    t, h, w = 2, 1, 2
    expected = latents[1, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].flatten()
    assert torch.equal(tokens[1, (t * 2 + h) * 3 + w], expected)
    assert torch.equal(unpatchify(tokens, grid), latents)
    out = torch.full((2, 20, 20), torch.nan)
    patchify(latents.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)[:1], out=out[:1, 1:19])
    assert torch.equal(out[:1, 1:19], tokens[:1]) and out[0, 0].isnan().all() and out[1:].isnan().all()


def test_twenty_seconds_are_187200_tokens():
    latents = torch.empty(1, 768, 120, 60, 104, device="meta")
    tokens, grid = patchify(latents)
    assert tokens.shape == (1, 187_200, 3072) and grid == (120, 30, 52)


def test_patchify_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="multiples of 2"):
        patchify(torch.zeros(1, 4, 2, 3, 4))
    with pytest.raises(ValueError, match="unpatchify: tokens must be"):
        unpatchify(torch.zeros(1, 7, 16), (2, 2, 2))
    with pytest.raises(ValueError, match="unpatchify: tokens must be"):
        unpatchify(torch.zeros(1, 8, 15), (2, 2, 2))
