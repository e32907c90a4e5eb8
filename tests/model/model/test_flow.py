"""Flow matching: paths, the shift of times, the loss and the sampler, by hand."""

import math

import pytest
import torch

from vidmem_model.model.flow import interpolate, logit_normal, sample, shift_timesteps, velocity_loss


def test_logit_normal_is_the_sigmoid_of_a_normal():
    drawn = logit_normal((20000,), mean=0.2, std=1.5, generator=torch.Generator().manual_seed(3))
    assert drawn.min() > 0 and drawn.max() < 1
    assert drawn.median().item() == pytest.approx(1 / (1 + math.exp(-0.2)), abs=0.01)
    assert drawn.logit().std().item() == pytest.approx(1.5, abs=0.03)
    assert torch.equal(drawn, logit_normal((20000,), 0.2, 1.5, torch.Generator().manual_seed(3)))


def test_shift_by_hand():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert shift_timesteps(t, 3.0).tolist() == pytest.approx([0.0, 0.5, 0.75, 1.0])
    assert torch.equal(shift_timesteps(t, 1.0), t)


def test_path_runs_from_sample_to_noise_frame_by_frame():
    x0, noise = torch.full((1, 2, 2, 1, 1), 2.0), torch.full((1, 2, 2, 1, 1), -2.0)
    assert interpolate(x0, noise, torch.tensor([0.25])).flatten().tolist() == [1.0] * 4
    by_frame = interpolate(x0, noise, torch.tensor([[0.0, 1.0]]))
    assert by_frame.flatten().tolist() == [2.0, -2.0, 2.0, -2.0]
    assert interpolate(x0.half(), noise.half(), torch.tensor([0.5])).dtype == torch.float32


def test_loss_is_the_mean_over_all_but_the_batch():
    x0 = torch.zeros(2, 1, 1, 1, 2)
    noise = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 1, 1, 1, 2)
    assert velocity_loss(torch.zeros_like(x0), x0, noise).tolist() == [5.0, 0.0]
    assert velocity_loss(noise - x0, x0, noise).tolist() == [0.0, 0.0]
    # In bfloat16 the difference of 256 and -1 would round to 256.
    wide = torch.tensor([[256.0]], dtype=torch.bfloat16)
    loss = velocity_loss(wide * 0, -torch.ones_like(wide), wide)
    assert loss.dtype == torch.float32 and loss.item() == 257.0**2


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (7, 1.0), (4, 3.0)])
def test_euler_is_exact_on_a_straight_flow(steps, shift):
    x0, noise = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    times = []

    def velocity(x, t):
        times.append(t[0].item())
        torch.testing.assert_close(x, interpolate(x0, noise, t))
        return noise - x0

    torch.testing.assert_close(sample(velocity, noise, steps, shift), x0)
    assert times == pytest.approx([shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps))])


def test_sampler_needs_a_step():
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        sample(lambda x, t: x, torch.zeros(1, 1), 0)
