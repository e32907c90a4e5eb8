"""Which plans blocks, calls and steps share, also where a block is computed again for its gradients."""

import pytest
import torch
from diffusers_helpers import MODELS, draw_grid, inputs_of, sample_of, tiny_framepack, tiny_hunyuan, tiny_wan

from vidmem_kernels.diffusers import apply_token_merging

CASES = [(name, seed) for seed, name in enumerate(MODELS)]


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("options", [{}, {"q_ratio": 0.3, "metric": "key"}, {"reuse_blocks": 2}])
@pytest.mark.parametrize("name, seed", CASES)
def test_a_batch_is_its_samples_one_by_one(name, seed, options):
    model = MODELS[name](layers=2, seed=seed)
    inputs = inputs_of(model, draw_grid(seed), 3, seed)
    apply_token_merging(model, kv_ratio=0.5, **options)
    batch = run(model, inputs)
    for i in range(3):
        assert (run(model, sample_of(inputs, i))[0] - batch[i]).abs().max() < 2e-6


def test_one_plan_for_a_batch_and_for_the_calls_of_a_step():
    model = tiny_wan()
    grid, count = (3, 4, 5), 3
    inputs = inputs_of(model, grid, 2)
    times = inputs["timestep"] = torch.tensor([900, 900])
    handle = apply_token_merging(model, share_plan="batch")
    both = run(model, inputs)
    assert handle.stats()["plans_made"] == count
    # Guidance in two calls, as pipelines make them: the second one's samples are others, its plan is the first one's.
    same = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].flip(0)}
    run(model, same)
    assert handle.stats()["plans_made"] == count and handle.step == 0
    times += 0  # another version of the tensor is another step, as with buffers that are filled anew
    run(model, inputs)
    assert handle.stats()["plans_made"] == 2 * count and handle.step == 1
    run(model, inputs | {"timestep": times.clone()})
    assert handle.stats()["plans_made"] == 3 * count and handle.step == 2
    run(model, inputs_of(model, (3, 5, 4), 2) | {"timestep": times})  # as many tokens, another grid
    assert handle.stats()["plans_made"] == 4 * count
    handle.reset()
    assert torch.equal(run(model, inputs), both) and handle.stats()["forwards"] == 1
    # A shared plan is no sample's own.
    halves = [run(model, sample_of(inputs, i) | {"timestep": times[i : i + 1].clone()}) for i in range(2)]
    assert (torch.cat(halves) - both).abs().max() > 1e-4


@pytest.mark.parametrize("set_by_hand", [False, True])
def test_plans_live_for_steps(set_by_hand):
    model = tiny_wan(layers=2)
    handle = apply_token_merging(model, reuse_steps=3, reuse_blocks=2)
    made, merged = [], []
    for step in range(7):
        inputs = inputs_of(model, (3, 4, 4), 1, seed=step)
        times = torch.tensor([900 - 100 * step])
        if set_by_hand:
            handle.step = step
        for prompt in (0, 1):  # two calls with plans of their own
            text = inputs_of(model, (3, 4, 4), 1, seed=50 + prompt)["encoder_hidden_states"]
            merged.append(run(model, inputs | {"timestep": times, "encoder_hidden_states": text}))
        assert handle.step == step
        made.append(handle.stats()["plans_made"])
    assert made == [2, 2, 2, 4, 4, 4, 6]
    with handle:
        handle.reset()
        inputs = inputs_of(model, (3, 4, 4), 1, seed=3)
        text = inputs_of(model, (3, 4, 4), 1, seed=51)["encoder_hidden_states"]
        first = run(model, inputs | {"timestep": torch.tensor([600]), "encoder_hidden_states": text})
        assert torch.equal(first, merged[7])  # step 3 had plans of its own, not of another call or step


def test_a_time_that_rises_begins_a_new_video():
    model = tiny_wan(layers=1)
    handle = apply_token_merging(model, steps=[0, 2])
    inputs = inputs_of(model, (3, 4, 4))
    merged = []
    for time in (900, 500, 100, 900, 500, 500):
        handle._state().lengths.clear()
        run(model, inputs | {"timestep": torch.tensor([time])})
        merged.append((handle.step, bool(handle.stats()["blocks"])))
    assert merged == [(0, True), (1, False), (2, True), (0, True), (1, False), (2, True)]


def test_ratios_by_block_and_step():
    model = tiny_hunyuan()  # four blocks
    inputs = inputs_of(model, (3, 4, 4))
    handle = apply_token_merging(
        model, kv_ratio=lambda block, step: 0.25 * (block % 2) * step, q_ratio={2: 0.5}, blocks=[1, 2], reuse_blocks=2
    )
    for step, keys in ((0, 0), (1, 8), (3, 24), (1, 8)):
        handle.step = step
        plain = run(model, inputs)
        blocks = handle.stats()["blocks"]
        assert blocks[2]["tokens"] - blocks[2]["queries"] == 16 and blocks[2]["tokens"] == blocks[2]["keys"]
        assert keys == 0 and 1 not in blocks or blocks[1]["tokens"] - blocks[1]["keys"] == keys
    assert set(blocks) == {1, 2} and plain.isfinite().all()


def gradients(model, runs, checkpointing):
    """Of all weights, by the sum of losses whose forwards all run before the backward."""
    (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
    model.zero_grad()
    outs = [model(**inputs)[0] for inputs in runs]
    sum(out.square().sum() for out in outs).backward()
    return [out.detach() for out in outs], [None if w.grad is None else w.grad.clone() for w in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{"reuse_blocks": 2}, {"q_ratio": 0.5, "reuse_blocks": 3, "share_plan": "batch"}, {"reuse_steps": 2}],
    ids=["blocks", "batch", "steps"],
)
@pytest.mark.parametrize("make", [tiny_wan, tiny_hunyuan, tiny_framepack])
def test_gradients_with_checkpointing(make, options):
    """Two shapes of as many tokens: the second forward comes before the first one's blocks are computed again."""
    model = make()
    runs = [inputs_of(model, grid, 2, seed) for seed, grid in enumerate([(3, 4, 6), (3, 6, 4), (3, 4, 6)])]
    handle = apply_token_merging(model, kv_ratio=0.5, **options)
    plain_outs, plain = gradients(model, runs, False)
    handle.reset()
    outs, computed_again = gradients(model, runs, True)
    for a, b in zip(plain_outs + plain, outs + computed_again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert sum(g is not None and bool(g.any()) for g in plain) > 20


def test_gradients_of_runs_apart():
    """The plans of one forward are not those of another that is alive: gradients add up."""
    model = tiny_wan()
    runs = [inputs_of(model, grid, 1, seed) for seed, grid in enumerate([(3, 4, 6), (3, 6, 4)])]
    apply_token_merging(model, kv_ratio=0.5, reuse_blocks=2)
    _, together = gradients(model, runs, True)
    apart = [gradients(model, [inputs], False)[1] for inputs in runs]
    for total, *parts in zip(together, *apart, strict=True):
        assert total is None or torch.allclose(total, sum(parts), atol=1e-5, rtol=1e-4)
