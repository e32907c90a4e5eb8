"""Samples of both stages, masks, the training loop, and the configurations of the commands."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
import yaml
from training_helpers import BOX, MODEL, QUERIES, TRAIN, block, latents, train

from vidmem_model.cli import main
from vidmem_model.errors import UserError
from vidmem_model.model.config import Compression
from vidmem_model.model.file import load_model, save_model
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.train import continuation as finetune
from vidmem_model.train import loop as training
from vidmem_model.train.blocks import seeded
from vidmem_model.train.config import TrainConfig
from vidmem_model.train.continuation import ContinuationConfig, Continuations, FinetuneConfig
from vidmem_model.train.curve import read_curve
from vidmem_model.train.latents import Latents, Spans
from vidmem_model.train.muon import Muon
from vidmem_model.train.optimizers import optimizers
from vidmem_model.train.recipe import read_pretrain
from vidmem_model.train.retrieval import FrameQueries, QueryConfig, low_levels, mask


def queries(shift=1.0, **changes):
    return FrameQueries(latents(), MODEL.encoders, dataclasses.replace(QUERIES, **changes), shift=shift)


def equal(a, b):
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs if not isinstance(x, list)
    )


def test_samples_depend_on_seed_step_and_number_only():
    whole = queries()(7, range(4))
    half = queries()(7, range(2, 4))
    assert equal([x[2:] for x in whole[1:5]], list(half[1:5]))
    assert equal([whole.history.latents[2:], whole.history.lows[0][2:]], [half.history.latents, half.history.lows[0]])
    assert whole.prompts[2:] == half.prompts
    assert not torch.equal(whole.noise, queries()(8, range(4)).noise)
    other = FrameQueries(latents(), MODEL.encoders, QUERIES, seed=1)
    assert not torch.equal(whole.noise, other(7, range(4)).noise)


def find(history, blocks, align):
    """The block and start of a clean history."""
    for each in blocks:
        for start in range(0, each.latents.shape[1] - history.shape[1] + 1, align):
            if torch.equal(each.latents[:, start : start + history.shape[1]].float(), history):
                return each, start
    raise AssertionError("the history is no stretch of a block")


def test_mask_of_stage_one():
    """Frames of Omega are clean and are the targets; the others mix with noise at one level a frame."""
    draw = queries()
    clean = queries(mask_probability=0.0)
    every = []
    for step in range(40):
        batch = draw(step, [0])
        omega = batch.frames[0].long()
        # The level is drawn only where there is a mask: everything before it is the same.
        history = clean(step, [0]).history.latents[0]
        source, start = find(history, draw.latents.blocks, BOX.time)
        assert torch.equal(batch.target[0], history[:, omega])
        assert torch.equal(batch.history.latents[0][:, omega], history[:, omega])
        low = source.lows[BOX][:, start // BOX.time : (start + QUERIES.history) // BOX.time].float()
        for box in range(QUERIES.history // BOX.time):
            same = torch.equal(batch.history.lows[0][0, :, box], low[:, box])
            assert same == bool((omega // BOX.time == box).any())
        for frame in set(range(QUERIES.history)) - set(omega.tolist()):
            x, y = history[:, frame].flatten(), batch.history.latents[0, :, frame].flatten()
            # y = (1 - s) x + s eps: the regression on x gives 1 - s, what is left has deviation s.
            left = float(x @ y / (x @ x))
            every.append((1 - left, float((y - left * x).std())))
    slope, spread = torch.tensor(every).T
    assert float((slope - spread).abs().mean()) < 0.06
    # Median of sigmoid(0.2 + z) is sigmoid(0.2) = 0.55; its quartiles are at z = +-0.674.
    wanted = torch.sigmoid(0.2 + torch.tensor([-0.674, 0.0, 0.674]))
    torch.testing.assert_close(spread.quantile(torch.tensor([0.25, 0.5, 0.75])), wanted, rtol=0, atol=0.06)


def test_mixed_histories():
    """Two histories are added with weights on the unit circle, the same for the low resolution."""
    draw, blocks = queries(mix_probability=1.0, mask_probability=0.0), latents().blocks
    starts = [(b, s) for b in blocks for s in range(0, b.latents.shape[1] - 7, BOX.time)]
    columns = torch.stack([b.latents[:, s : s + 8].float().flatten() for b, s in starts], 1).double()
    lows = torch.stack(
        [b.lows[BOX][:, s // BOX.time :][:, : 8 // BOX.time].float().flatten() for b, s in starts], 1
    ).double()
    angles = []
    for step in range(30):
        batch = draw(step, [0])
        weights = torch.linalg.lstsq(columns, batch.history.latents[0].flatten().double()[:, None]).solution[:, 0]
        used = weights.abs() > 1e-4
        assert used.sum() <= 2
        if used.sum() == 2:  # not one history with itself
            assert weights.square().sum().item() == pytest.approx(1.0, abs=1e-4)
            angles.append(float(torch.atan2(*weights[used])))
        torch.testing.assert_close(lows @ weights, batch.history.lows[0][0].flatten().double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(batch.target[0], batch.history.latents[0][:, batch.frames[0].long()])
    assert len(angles) > 15 and min(angles) < -1.5 and max(angles) > 1.5
    plain = queries(mix_probability=0.5, mask_probability=0.0)
    mixed = 0
    for step in range(60):
        try:
            find(plain(step, [0]).history.latents[0], blocks, BOX.time)
        except AssertionError:
            mixed += 1
    assert 15 < mixed < 45


def test_rolled_histories():
    """Moved by whole low-resolution cells, the low-resolution latents along with them."""
    draw, found = queries(roll=True, mask_probability=0.0), set()
    blocks = latents().blocks
    for step in range(60):
        batch = draw(step, [0])
        history, low = batch.history.latents[0], batch.history.lows[0][0]
        for rows, columns in ((y, x) for y in range(0, 4, 2) for x in range(0, 8, 2)):
            try:
                each, start = find(history.roll((-rows, -columns), (2, 3)), blocks, BOX.time)
            except AssertionError:
                continue
            found.add((rows, columns))
            expected = each.lows[BOX][:, start // BOX.time :][:, : 8 // BOX.time].float()
            assert torch.equal(low.roll((-(rows // 2), -(columns // 2)), (2, 3)), expected)
            break
        else:
            raise AssertionError("moved by no whole number of cells")
    assert len(found) == 8


def test_omega_is_everywhere_and_the_times_are_logit_normal():
    draw = queries()
    batches = [draw(step, range(8)) for step in range(60)]
    counts = torch.bincount(torch.cat([b.frames.flatten() for b in batches]).long(), minlength=8)
    assert counts.sum() == 960 and counts.min() > 80 and counts.max() < 165  # 120 each, deviation 9.5
    t = torch.cat([b.t for b in batches])
    wanted = torch.sigmoid(torch.tensor([-0.674, 0.0, 0.674]))
    torch.testing.assert_close(t.quantile(torch.tensor([0.25, 0.5, 0.75])), wanted, rtol=0, atol=0.05)
    shifted = torch.cat([queries(shift=3.0)(step, range(8)).t for step in range(60)])
    torch.testing.assert_close(shifted, 3 * t / (1 + 2 * t))
    dropped = sum(prompt == "" for b in batches for prompt in b.prompts)
    kept = [prompt for b in batches for prompt in b.prompts]
    assert set(kept) == {"", "a rabbit", "a squirrel"} and 100 < dropped < 260


def test_low_levels():
    levels = torch.tensor([0.2, 0.4, 0.0, 0.8, 0.5, 0.7, 0.9])
    assert low_levels(levels, torch.tensor([2, 6]), 2).tolist() == pytest.approx([0.3, 0.0, 0.6])
    assert low_levels(levels, torch.tensor([2]), 1).tolist() == levels.tolist()


def test_mask_mixes():
    x = torch.randn(3, 4, 2, 2)
    levels = torch.tensor([0.0, 0.25, 1.0, 0.5])
    made = mask(x, levels, seeded(1))
    noise = torch.randn(x.shape, generator=seeded(1))
    for frame, s in enumerate(levels.tolist()):
        torch.testing.assert_close(made[:, frame], (1 - s) * x[:, frame] + s * noise[:, frame])
    assert torch.equal(made[:, 0], x[:, 0])


def test_spans_are_aligned_and_all_places_are_equally_probable():
    spans = Spans(latents(), 8, 2)
    drawn = [spans.draw(seeded(0, i)) for i in range(1400)]
    counts = {}
    for each, start in drawn:
        counts[each.start, start] = counts.get((each.start, start), 0) + 1
    places = [(0.0, s) for s in range(0, 9, 2)] + [(8.0, 0), (8.0, 2)] + [(16.0, s) for s in range(0, 13, 2)]
    assert sorted(counts) == places
    assert min(counts.values()) > 60 and max(counts.values()) < 140  # 100 each
    with pytest.raises(UserError, match=r"no block of the videos has 21 latent frames, the longest has 20"):
        Spans(latents(), 21, 2)


def test_samples_of_stage_two():
    config = ContinuationConfig(history=8, targets=3, window=2, drop_prompt=0.0)
    draw = Continuations(latents(), MODEL.encoders, config)
    windows, empty = 0, 0
    whole = Continuations(latents(), MODEL.encoders, dataclasses.replace(config, empty_probability=0.0))
    for step in range(40):
        batch = draw(step, range(2))
        if batch.history.latents.shape[2] == 0:
            empty += 1
            full = whole(step, range(2))
            assert (
                batch.history.lows[0].shape[2] == 0
                and batch.window is None
                and batch.frames.tolist() == [[0, 1, 2]] * 2
            )
            assert torch.equal(batch.target, full.target) and batch.prompts == full.prompts
            loss = training.FlowMatching(MemoryModel(MODEL))(batch)
            assert loss.isfinite()
            loss.backward()
            continue
        for i in range(2):
            source, start = find(batch.history.latents[i], draw.latents.blocks, BOX.time)
            assert torch.equal(batch.target[i], source.latents[:, start + 8 : start + 11].float())
            assert torch.equal(batch.history.lows[0][i], source.lows[BOX][:, start // 2 : start // 2 + 4].float())
            assert batch.prompts[i] == draw.latents.prompt(source, start + 8)
        assert batch.frames.tolist() == [[8, 9, 10]] * 2
        if batch.window is not None:
            windows += 1
            assert torch.equal(batch.window, batch.history.latents[:, :, 6:])
            assert batch.window_frames.tolist() == [[6, 7]] * 2
        assert equal(draw(step, [1])[1:3], tuple(x[1:] for x in batch[1:3]))
    assert 8 < windows < 32 and 0 < empty < 12


def test_targets_beyond_a_cut_are_not_taken():
    """A film that stands still, with cuts before frames 9 and 16: a target may not have one in or before it."""
    still = block(24, 0)
    shots = torch.arange(24).ge(9).float() + torch.arange(24).ge(16)
    still = dataclasses.replace(still, latents=shots.view(1, -1, 1, 1).expand(8, 24, 4, 8).half())
    config = ContinuationConfig(history=8, targets=2, window=2, max_change=0.5)
    draw = Continuations(Latents((still,), 0.5), MODEL.encoders, config)
    # Histories end at start + 7: targets (8, 9) have a cut, (16, 17) follow one; (10, 11), (12, 13), ... not.
    assert [start for _, start in draw.spans.starts] == [2, 4, 6, 10, 12, 14]
    every = Continuations(Latents((still,), 0.5), MODEL.encoders, dataclasses.replace(config, max_change=None))
    assert [start for _, start in every.spans.starts] == [0, 2, 4, 6, 8, 10, 12, 14]
    with pytest.raises(UserError, match=r"none of the \d+ spans of 10 latent frames is without a cut"):
        Continuations(latents(), MODEL.encoders, config)
    with pytest.raises(ValueError, match="max_change must be positive, got 0"):
        dataclasses.replace(config, max_change=0)


def test_loss_is_that_of_the_velocity():
    """The model predicts 0 at first, and its target is noise - sample."""
    batch = queries()(0, range(4))

    class Zero(torch.nn.Module):
        def remember(self, history):
            assert history is batch.history

        def predict(self, x, t, prompts, **given):
            s = t.view(-1, 1, 1, 1, 1)
            torch.testing.assert_close(x, (1 - s) * batch.target + s * batch.noise)
            assert given["frames"] is batch.frames and prompts is batch.prompts
            return torch.zeros_like(x)

    loss = training.FlowMatching(Zero())(batch)
    torch.testing.assert_close(loss, (batch.noise - batch.target).square().mean())


def test_a_tiny_model_learns_its_film_by_heart(tmp_path):
    """Two latent frames, repeated: the loss falls to less than half within 40 steps."""
    pair = block(2, 5)
    one = dataclasses.replace(
        pair, latents=pair.latents.repeat(1, 8, 1, 1), lows={BOX: pair.lows[BOX].repeat(1, 8, 1, 1)}
    )
    draw = FrameQueries(Latents((one,), 0.5), MODEL.encoders, QueryConfig(history=8, queries=2))
    config = dataclasses.replace(TRAIN, steps=40, batch=8, lr=1e-2, schedule="constant", checkpoint_every=100)
    training.fit(lambda: MemoryModel(MODEL), draw, config, tmp_path, {}, torch.device("cpu"))
    losses = [row["loss"] for row in read_curve(tmp_path / "curve.csv")]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.5 * first


def test_schedule():
    config = dataclasses.replace(TRAIN, steps=110, warmup_steps=10)
    shares = [training.schedule(config, step) for step in (0, 4, 9, 10, 60, 110)]
    assert shares == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.01 + 0.99 / 2, 0.01])
    constant = dataclasses.replace(config, schedule="constant")
    assert training.schedule(constant, 100) == 1.0


def test_each_optimizer_has_its_learning_rate(tmp_path, monkeypatch):
    seen = {torch.optim.AdamW: [], Muon: []}
    for kind, rates in seen.items():

        def watched(self, step=kind.step, rates=rates):
            rates.extend(group["lr"] for group in self.param_groups)
            step(self)

        monkeypatch.setattr(kind, "step", watched)
    train(tmp_path, steps=2, warmup_steps=2, lr=0.1, muon_lr=0.4, schedule="constant")
    assert seen[torch.optim.AdamW] == pytest.approx([0.05, 0.05, 0.1, 0.1])
    assert seen[Muon] == pytest.approx([0.2, 0.4])


def test_layers_of_the_linear_start_may_learn_slower(tmp_path):
    """With fitted_lr 0 they do not change while other weights are trained; by default they are trained, too."""
    start, kept, free = (
        dict(train(tmp_path / name, steps=1, linear=True, **how).named_parameters())
        for name, how in (("0", {"lr": 1e-12, "muon_lr": 0.0}), ("1", {"fitted_lr": 0.0}), ("2", {}))
    )

    def moved(trained):
        return {name for name in start if float((start[name] - trained[name]).detach().abs().max()) > 1e-6}

    layers = ("encoders.0.shortcut.", "dit.unfold.", "dit.patch_projection.")
    assert moved(kept) == {name for name in moved(free) if not name.startswith(layers)}
    assert len(moved(free) - moved(kept)) >= 6


def test_who_takes_which_weights():
    model = MemoryModel(MODEL)
    named = dict(model.named_parameters())
    adamw, muon = optimizers(model, TRAIN, torch.float32)
    taken = [{id(p) for group in each.param_groups for p in group["params"]} for each in (adamw, muon)]
    assert not taken[0] & taken[1] and len(taken[0] | taken[1]) == len(named)
    layers = {name.removeprefix("dit.blocks.0.") for name, p in named.items() if id(p) in taken[1] and ".0." in name}
    assert layers == {"qkv.weight", "out.weight", "up.weight", "down.weight"}
    (alone,) = optimizers(model, dataclasses.replace(TRAIN, muon_lr=0.0), torch.float32)
    assert isinstance(alone, torch.optim.AdamW)


def test_average_of_the_weights(tmp_path, monkeypatch):
    """What is returned is the moving average, its decay rising as (step + 1) / (step + 10)."""
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        step(self, *args)
        seen.append([p.detach().clone() for group in self.param_groups for p in group["params"]])

    torch.manual_seed(TRAIN.seed)
    names = [name for name, _ in MemoryModel(MODEL).named_parameters()]
    name = next(n for n in names if n.endswith("patch_projection.weight"))
    torch.manual_seed(TRAIN.seed)
    expected = dict(MemoryModel(MODEL).named_parameters())[name].detach().clone()
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    model = train(tmp_path, steps=5)
    index = next(
        i
        for i, p in enumerate(seen[0])
        if p.shape == expected.shape and float((p - expected).abs().max()) < 0.1 and p.ndim == 2
    )
    for i, weights in enumerate(seen):
        decay = min(0.9, (i + 1) / (i + 10))
        expected = decay * expected + (1 - decay) * weights[index]
    torch.testing.assert_close(dict(model.named_parameters())[name], expected)


def test_norms_and_biases_do_not_decay():
    model = MemoryModel(MODEL)
    named = dict(model.named_parameters())
    (optimizer,) = optimizers(model, dataclasses.replace(TRAIN, muon_lr=0.0), torch.float32)
    decaying, free = (set(map(id, group["params"])) for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["weight_decay"] == TRAIN.weight_decay
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    named = dict(model.named_parameters())
    assert id(named["dit.head.weight"]) in decaying and id(named["dit.head.bias"]) in free
    assert id(named["dit.blocks.0.table"]) in free and id(named["dit.blocks.0.text_norm.weight"]) in free
    assert len(decaying) + len(free) == len(named)


def test_bfloat16_learns_too(tmp_path):
    train(tmp_path / "float32", steps=6)
    train(tmp_path / "bfloat16", steps=6, precision="bfloat16")
    pairs = [[row["loss"] for row in read_curve(tmp_path / name / "curve.csv")] for name in ("float32", "bfloat16")]
    assert pairs[0] != pairs[1] and pairs[1] == pytest.approx(pairs[0], rel=0.02)


@pytest.mark.parametrize(
    ("has", "dtype"),
    [({"avx2": True}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(tmp_path, monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    for precision in (dtype, "auto"):
        train(tmp_path / precision, steps=3, precision=precision)
    curves = [read_curve(tmp_path / name / "curve.csv") for name in (dtype, "auto")]
    assert [row["loss"] for row in curves[0]] == [row["loss"] for row in curves[1]]


def stage_one(folder):
    torch.manual_seed(3)
    model = MemoryModel(dataclasses.replace(MODEL, vae=dataclasses.replace(MODEL.vae, kind="dct")))
    save_model(folder, model)
    return model


@pytest.mark.parametrize("rank, frozen", [(2, False), (2, True), (0, False)])
def test_what_stage_two_trains(tmp_path, rank, frozen):
    stage_one(tmp_path / "one")
    config = FinetuneConfig(str(tmp_path / "one"), str(tmp_path / "two"), lora_rank=rank, freeze_encoder=frozen)
    trained = [name for name, p in finetune.adapted(config).named_parameters() if p.requires_grad]
    assert any(name.startswith("encoders.") for name in trained) is not frozen
    assert any(".lora_" in name for name in trained) is bool(rank)
    assert any(name.startswith("dit.") and ".lora_" not in name for name in trained) is not bool(rank)


CONFIG = """
model: {preset: tiny, vae: {kind: dct}, dit: {depth: 1}, encoders: [{branches: hr}, {rate: [2, 2, 4]}]}
data: {test_every: 3}
optimisation: {lr: 3e-4, steps: 7}
output: out
"""


def test_configuration(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(CONFIG)
    config = read_pretrain(file)
    assert config.optimisation == TrainConfig(lr=3e-4, steps=7)
    first, second = config.model.encoders
    assert first == dataclasses.replace(MODEL.encoders[0], branches="hr")
    assert second == dataclasses.replace(MODEL.encoders[0], compression=Compression(4, 2, 2))
    assert config.model.dit == dataclasses.replace(MODEL.dit, depth=1)
    assert config.model.vae.kind == "dct" and config.data.test_every == 3
    file.write_text("model: tiny\noutput: out\n")
    assert read_pretrain(file).model == MODEL


@pytest.mark.parametrize(
    "text, says",
    [
        ("model: tiny", "needs ['output']"),
        ("output: x", "needs ['model']"),
        ("model: small\noutput: x", "model.preset must be one of ['demo', "),
        ("model: {preset: tiny, dit: {detph: 3}}\noutput: x", "model.dit: keys must be among"),
        ("model: {preset: tiny, dit: {depth: many}}\noutput: x", "model.dit.depth: must be of type int, got 'many'"),
        ("model: {preset: tiny, encoders: [{rate: [2, 2]}]}\noutput: x", "model.encoders[0].rate: must have 3 entries"),
        ("model: tiny\noutput: x\noptimisation: {lr: -1}", "TrainConfig: lr must be positive, got -1.0"),
        ("model: tiny\noutput: x\nsampling: {queries: 99}", "queries must be in [1, 24], got 99"),
        ("model: tiny\noutput: x\nsteps: 3", "keys must be among"),
        ("- model", "must be a mapping of keys to values, got list"),
        ("model: [", "is not YAML"),
        ("model: 3\noutput: x", "model: must be a mapping"),
    ],
)
def test_a_wrong_configuration_is_one_line_with_the_key(tmp_path, capsys, text, says):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert main(["pretrain", str(file)]) == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"vidmem: error: {file}") and says in error
    assert all(each.startswith("vidmem: note: ") and each.endswith("rename it to compression") for each in notes)
    assert len(notes) == ("rate" in text)


def test_other_mistakes_are_one_line(tmp_path, capsys):
    file = tmp_path / "b.yaml"
    for text, says in (
        ("output: x", "the key `from` is missing"),
        ("start: x\noutput: x", "is `from`, got start"),
        (f"from: {tmp_path}/none\noutput: {tmp_path}/x", "no such file"),
        ("from: a\noutput: x\nlora_rank: -1", "lora_rank must not be negative"),
    ):
        file.write_text(text)
        assert main(["finetune", str(file)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error
    assert main(["pretrain", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err


def test_commands_from_film_to_model(tmp_path, capsys, monkeypatch):
    """Stage I is interrupted and resumed; Stage II starts from its model; both write model, curve and settings."""
    monkeypatch.setattr("vidmem_model.train.run.prepare", lambda *_: latents_with_test())
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    optimisation = {"steps": 4, "batch": 2, "threads": 1, "warmup": 1, "device": "cpu"}
    sampling = {"history": 8}
    one.write_text(
        yaml.safe_dump(
            {
                "model": {"preset": "tiny", "vae": {"kind": "dct"}},
                "output": str(tmp_path / "one"),
                "optimisation": optimisation,
                "sampling": sampling,
            }
        )
    )
    two.write_text(
        yaml.safe_dump(
            {
                "from": str(tmp_path / "one"),
                "output": str(tmp_path / "two"),
                "lora_rank": 2,
                "optimisation": optimisation,
                "sampling": {**sampling, "targets": 2},
            }
        )
    )
    forward, calls = training.FlowMatching.forward, []

    def interrupting(self, batch):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    monkeypatch.setattr(training.FlowMatching, "forward", interrupting)
    assert main(["pretrain", str(one)]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    kept = f"the checkpoint is in {tmp_path / 'one'}; run the same command again to resume"
    assert said == f"vidmem: stopped after step 2, {kept}"
    assert main(["pretrain", str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "model.safetensors")
    assert main(["finetune", str(two)]) == 0
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert [row["step"] for row in read_curve(folder / "curve.csv")] == [1, 2, 3, 4]
        model = load_model(folder)
        assert model.extra["steps"] == 4 and model.extra["training"]["optimisation"]["batch"] == 2
    before, after = load_model(tmp_path / "one").state_dict(), load_model(tmp_path / "two").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["dit.blocks.0.qkv.weight"], after["dit.blocks.0.qkv.weight"])
    assert torch.equal(before["dit.blocks.0.qkv.bias"], after["dit.blocks.0.qkv.bias"])


def latents_with_test():
    whole = latents()
    return dataclasses.replace(whole, blocks=(*whole.blocks, block(16, 9, split="test", start=40.0)))
