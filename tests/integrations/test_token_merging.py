"""Token merging in diffusers' models: what it computes, that it goes without a trace, and what it refuses."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers_helpers import MODELS, draw_grid, inputs_of, tiny_framepack, tiny_hunyuan, tiny_wan
from torch import nn

import vidmem_kernels as vk
from vidmem_kernels.diffusers import Family, TokenMerging, TokenMergingConfig, apply_token_merging, register_family
from vidmem_kernels.diffusers.families import WAN, family_of
from vidmem_kernels.diffusers.token_merging_plans import ForwardRecord

CASES = [(name, seed) for seed, name in enumerate(MODELS)]


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def drawn(name, seed, batch=2):
    model = MODELS[name](layers=2, seed=seed)
    return model, inputs_of(model, draw_grid(seed), batch, seed)


def trace(model):
    """Names of everything that a module can be changed by, of all modules."""
    return {
        name: (
            sorted(set(module.__dict__) | set(module._modules)),
            [list(hooks) for key, hooks in sorted(module.__dict__.items()) if key.endswith("_hooks")],
            list(module._buffers),
            type(getattr(module, "processor", None)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name, seed", CASES)
def test_nothing_merged_and_removed_are_the_model_to_the_bit(name, seed):
    model, inputs = drawn(name, seed)
    plain, before, keys = run(model, inputs), trace(model), list(model.state_dict())
    with apply_token_merging(model, kv_ratio=0.0):
        assert list(model.state_dict()) == keys
        assert torch.equal(run(model, inputs), plain)
    handle = apply_token_merging(model, q_ratio=0.5)
    merged = run(model, inputs)
    assert merged.shape == plain.shape and merged.isfinite().all() and not torch.equal(merged, plain)
    handle.enabled = False
    assert torch.equal(run(model, inputs), plain)
    handle.enabled = True
    assert torch.equal(run(model, inputs), merged)
    handle.remove()
    assert torch.equal(run(model, inputs), plain) and trace(model) == before


class Spread:
    """A processor that gives every video token the merged key, value and rotation of its group, and merges none.

    Attention to all of those is what attention to merged keys with the logarithm of their sizes as bias is.
    """

    def __init__(self, family, size_bias):
        self.family, self.size_bias = family, size_bias

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        rotary_emb=None,
        image_rotary_emb=None,
    ):
        cos, sin, record = rotary_emb or image_rotary_emb
        query, key, value, text = self.family.project(attn, hidden_states, encoder_hidden_states)
        frames, height, width = record.grid
        extra = query.shape[1] - frames * height * width if self.family.extra_tokens == "before" else 0
        free = slice(extra + height * width, extra + frames * height * width)  # without the first frame
        grid = frames - 1, height, width
        compared = hidden_states[:, free]
        plan = vk.match_tokens(compared, compared.shape[1] // 2, grid=grid, stride=(1, 2, 2), window=(0, 1, 1))
        groups = nn.functional.one_hot(plan.assignment.long()).float()  # (B, N, M)
        mean = groups @ (groups / groups.sum(dim=1, keepdim=True)).mT  # (B, N, N)
        bias = torch.zeros(query.shape[:2])
        if not self.size_bias:
            bias[:, free] = -mean.count_nonzero(dim=2).log()

        def spread(x):  # (B or 1, L, H or 1, D)
            x = x.expand(len(query), -1, -1, -1).clone()
            x[:, free] = torch.einsum("bnm,bmhd->bnhd", mean, x[:, free])
            return x

        def turned(x, cos, sin):
            return x * cos + torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) * sin

        angles = [x if x.dim() == 4 else x[None, :, None] for x in (cos, sin)]
        query, key, value = turned(query, *angles), turned(spread(key), *map(spread, angles)), spread(value)
        if text is not None:
            query, key, value = (torch.cat([x, y], dim=1) for x, y in zip((query, key, value), text, strict=True))
            bias = nn.functional.pad(bias, (0, text[0].shape[1]))
        if attention_mask is not None:
            bias = bias.masked_fill(~attention_mask[:, 0, 0], -torch.inf)
        score = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5 + bias[:, None, None]
        out = torch.einsum("bhqk,bkhd->bqhd", score.softmax(dim=-1), value).flatten(2)
        return self.family.output(attn, out, encoder_hidden_states)


@pytest.mark.parametrize("size_bias", [True, False])
@pytest.mark.parametrize("name, seed", CASES)
def test_merged_keys_are_attention_to_the_means_of_the_groups(name, seed, size_bias):
    model, inputs = drawn(name, seed)
    plain = run(model, inputs)
    apply_token_merging(model, kv_ratio=0.5, blocks=[1], size_bias=size_bias)
    merged = run(model, inputs)
    family = family_of(model)
    getattr([*family.blocks(model)][1].module, family.self_attention).set_processor(Spread(family, size_bias))
    expected = run(model, inputs)
    assert (merged - expected).abs().max() < 1e-5
    assert (merged - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_merged_queries_get_the_output_of_their_row(name):
    """Where all queries of a frame's cell are equal, merging them changes nothing."""
    model = MODELS[name](layers=1)
    grid = (3, 4, 6)
    inputs = inputs_of(model, grid, 2)
    cells = torch.nn.functional.avg_pool3d(inputs["hidden_states"], (1, 4, 4))
    inputs["hidden_states"] = cells.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)
    model.rope.register_forward_hook(lambda rope, args, out: (torch.ones_like(out[0]), torch.zeros_like(out[1])))
    plain = run(model, inputs)
    handle = apply_token_merging(model, kv_ratio=0.0, q_ratio=0.75, window=(0, 0, 0), protect_frames=())
    assert (run(model, inputs) - plain).abs().max() < 1e-5
    lengths = handle.stats()["blocks"][0]
    assert lengths["tokens"] - lengths["queries"] == 3 * 18 and lengths["keys"] == lengths["tokens"]


@pytest.mark.parametrize("name, seed", CASES)
def test_trains(name, seed):
    model, inputs = drawn(name, seed)
    apply_token_merging(model, kv_ratio=0.5, q_ratio=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = (model(**inputs)[0] - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[3] < losses[2] < losses[1] < losses[0]
    blocks = [block.module for block in family_of(model).blocks(model)]
    assert all(getattr(block, family_of(model).self_attention).to_k.weight.grad.any() for block in blocks)


@pytest.mark.parametrize("grid", [(1, 5, 4), (2, 1, 1), (3, 1, 7), (2, 7, 1)])
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_grids_with_little_to_merge(name, grid):
    model = MODELS[name](layers=1)
    inputs = inputs_of(model, grid)
    plain = run(model, inputs)
    apply_token_merging(model, kv_ratio=0.7)
    merged = run(model, inputs)
    assert merged.isfinite().all()
    assert (merged - plain).abs().max() < (1e-5 if grid in ((1, 5, 4), (2, 1, 1)) else 1)


def test_protected_frames_and_counts():
    model = tiny_wan(layers=2)
    inputs = inputs_of(model, (5, 4, 6), 1)
    for protect, ratio, keys in (
        ((), 0.5, 60),
        ((0,), 0.5, 72),
        ((0, -1), 0.25, 102),
        ((1, 3, 9), 0.75, 66),
        ((0,), 1 / 3, 88),
    ):
        with apply_token_merging(model, kv_ratio={1: ratio}, protect_frames=protect) as handle:
            run(model, inputs)
            assert handle.stats()["blocks"] == {1: {"tokens": 120, "queries": 120, "keys": keys}}
            assert handle.stats()["grid"] == (5, 4, 6)


@pytest.mark.parametrize("name", ["wan", "framepack"])
def test_copies_and_pickles_merge_and_are_taken_apart(name):
    model, inputs = drawn(name, 1)
    plain = run(model, inputs)
    handle = apply_token_merging(model, kv_ratio=0.5, share_plan="batch", reuse_steps=2)
    merged = run(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, inputs), merged)
        theirs = TokenMerging(other)
        theirs.enabled = False
        assert handle.enabled and torch.equal(run(model, inputs), merged)
        theirs.remove()
        assert torch.equal(run(other, inputs), plain) and torch.equal(run(model, inputs), merged)
    handle.remove()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("make", [tiny_wan, tiny_framepack])
def test_200_times_in_and_out(make):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 2, 3))
    plain, before = run(model, inputs), trace(model)
    count = None
    for i in range(200):
        handle = apply_token_merging(model, share_plan="batch")
        if i % 20 == 0:
            run(model, inputs)
        handle.remove()
        del handle
        if i == 20:
            gc.collect()
            count = len(gc.get_objects())
    gc.collect()
    assert trace(model) == before and torch.equal(run(model, inputs), plain)
    assert len(gc.get_objects()) < count + 50


def test_a_model_of_ones_own():
    class Own(type(tiny_wan(layers=1))):
        pass

    model = tiny_wan(layers=1)
    model.__class__ = Own
    fields = {name: getattr(WAN, name) for name in WAN.__dataclass_fields__}
    register_family(Family(**(fields | {"name": "own", "model_class": Own})))
    with apply_token_merging(model) as handle:
        run(model, inputs_of(model, (2, 3, 4)))
        assert handle.stats()["family"] == "own" and handle.stats()["plans_made"] == 1
    with pytest.raises(
        ValueError, match="register_family: family must have a name and a class that are not registered"
    ):
        register_family(WAN)
    with pytest.raises(TypeError, match="register_family: family must be a Family, got str"):
        register_family("wan")


WRONG = {
    "kv_ratio=.8": (ValueError, r"kv_ratio must be in \[0, 0.75\], what stride \(1, 2, 2\) leaves, got 0.8"),
    "kv_ratio=-.1": (ValueError, "kv_ratio must be in"),
    "kv_ratio='half'": (TypeError, "kv_ratio must be a number, a dict or a function, got str"),
    "kv_ratio={0: .9}": (ValueError, r"kv_ratio\[0\] must be in"),
    "q_ratio=lambda block, step: block": (ValueError, "q_ratio of block 1 at step 0 must be in"),
    "kv_ratio={3: .5}": (ValueError, r"the keys of kv_ratio must be in \[0, 2\], got 3"),
    "blocks=[0, 7]": (ValueError, r"blocks must be in \[0, 2\], got 7"),
    "blocks=[-1]": (ValueError, r"blocks must be in \[0, 2\], got -1"),
    "blocks=1": (TypeError, "blocks must be ints, got 1"),
    "steps=[-1]": (ValueError, "steps must be at least 0"),
    "metric='value'": (ValueError, "metric must be one of 'hidden', 'key', got 'value'"),
    "share_plan='all'": (ValueError, "share_plan must be one of None, 'batch', got 'all'"),
    "size_bias=1": (TypeError, "size_bias must be a bool, got int"),
    "stride=(1, 2)": (ValueError, "stride must be three ints"),
    "stride=(1, 0, 2)": (ValueError, "stride must be at least 1"),
    "window=(0, 1.5, 1)": (TypeError, "window must be ints"),
    "protect_frames=None": (TypeError, "protect_frames must be ints, got None"),
    "reuse_steps=0": (ValueError, "reuse_steps must be at least 1, got 0"),
    "reuse_blocks=1.5": (TypeError, "reuse_blocks must be an int, got float"),
    "ratio=.5": (TypeError, "apply_token_merging: options must be among kv_ratio, .*, got ratio"),
    "config=.5": (TypeError, "apply_token_merging: config must be a TokenMergingConfig, got float"),
    "config=TokenMergingConfig(), kv_ratio=.5": (TypeError, "options cannot be combined with config"),
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options(options):
    error, message = WRONG[options]
    model = tiny_wan(layers=3)
    before = trace(model)
    with pytest.raises(error, match=message):
        names = {"apply": apply_token_merging, "model": model, "TokenMergingConfig": TokenMergingConfig}
        eval(f"apply(model, {options})", names)
    assert trace(model) == before


def test_wrong_use():
    with pytest.raises(TypeError, match="model must be one of HunyuanVideoFramepack.*WanTransf.*, got Linear"):
        apply_token_merging(nn.Linear(2, 2))
    model = tiny_hunyuan(layers=1)
    with pytest.raises(RuntimeError, match="TokenMerging: model must merge tokens, got one that does not"):
        TokenMerging(model)
    handle = apply_token_merging(model)
    with pytest.raises(RuntimeError, match="apply_token_merging: model must not merge tokens already"):
        apply_token_merging(model)
    with pytest.raises(TypeError, match="TokenMerging: enabled must be a bool, got int"):
        handle.enabled = 1
    with pytest.raises(ValueError, match="TokenMerging: step must be at least 0, got -1"):
        handle.step = -1
    attn = model.transformer_blocks[0].attn
    ours = attn.processor
    attn.set_processor(ours.inner)
    with pytest.raises(RuntimeError, match="attention of block 0 must have the processor that merges, got Hunyuan"):
        handle.remove()
    attn.set_processor(ours)
    with pytest.raises(RuntimeError, match="rotary embedding of block 0 must come from a forward pass of the model"):
        attn(torch.randn(1, 12, 24), image_rotary_emb=(torch.ones(12, 12), torch.ones(12, 12)))
    angles = torch.ones(12, 12)
    with pytest.raises(ValueError, match=r"grid must hold at most the 12 tokens of block 0, got \(2, 3, 4\)"):
        attn(torch.randn(1, 12, 24), image_rotary_emb=(angles, angles, ForwardRecord((2, 3, 4), 0)))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention mask must have shape \(B or 1, 1, 1, 12\), got \(1, 1, 12, 12\)"):
        record = ForwardRecord((2, 2, 3), 0)
        attn(torch.randn(1, 12, 24), attention_mask=mask, image_rotary_emb=(angles, angles, record))
    handle.remove()
    for use in (handle.remove, handle.stats, handle.reset, lambda: handle.enabled):
        with pytest.raises(RuntimeError, match="TokenMerging: model must merge tokens, got one that does not"):
            use()


def test_without_diffusers():
    """One error with the line to run; and `import vidmem_kernels` does not import it where it is."""
    program = """
import sys
import vidmem_kernels, vidmem_kernels.diffusers
assert "diffusers" not in sys.modules
sys.modules["diffusers"] = None  # as if it were not there
try:
    from vidmem_kernels.diffusers import apply_token_merging
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    needs = "vidmem_kernels.diffusers.apply_token_merging needs diffusers (not installed)"
    assert done.stdout.strip() == f'{needs}; run: pip install "vidmem-kernels[diffusers]"', done.stderr
