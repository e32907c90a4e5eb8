"""The stages of `gpu_train.py`: recipes for a GPU, folders, and weights to move to another machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidmem_model.files import replacing
from vidmem_model.model.config import PRESETS
from vidmem_model.model.file import MODEL_FILE, VAE_FILE, load_model, save_model
from vidmem_model.model.lora import LORA_FILE
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.show.figure import BLUE, log_axis, plot
from vidmem_model.skeleton import skeleton
from vidmem_model.train import checkpoint
from vidmem_model.train.config import TrainConfig
from vidmem_model.train.continuation import finetune
from vidmem_model.train.recipe import read_finetune, read_pretrain, read_pretrain_vae
from vidmem_model.train.retrieval import pretrain
from vidmem_model.train.run import CURVE
from vidmem_model.train.vae import pretrain_vae
from vidmem_model.vae.causal import CausalVAE
from vidmem_model.video.films import DataConfig
from vidmem_model.weights import WeightsFile

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "runs" / "train_bundle.safetensors"
STAGES = ("vae", "memory", "continuation")
_TRAIN = {"vae": pretrain_vae, "memory": pretrain, "continuation": finetune}
# File of a stage's weights, in its folder and among what leaves the machine.
_WEIGHTS = {"vae": VAE_FILE, "memory": MODEL_FILE, "continuation": LORA_FILE}
# All rounds together; the VAE's are few, since every change of it changes what the others see.
_STEPS = {"vae": 12_000, "memory": 40_000, "continuation": 10_000}
# In place of the recipes' own, which are for some hours of one core. How many steps there will be is not known, so that
# the rate does not fall towards an end: the moving average of the weights does what that would.
_ON_GPU = {"schedule": "constant", "ema_decay": 0.999, "precision": "auto", "log_every": 50, "threads": None}


@dataclass(frozen=True)
class Plan:
    """What is trained, from what data, and where.

    Args:
        preset: "demo", or "tiny" to try everything out.
        bundle: file with the films.
        work: folder of the runs and latents.
        device: "cuda" or "cpu".
        steps: steps of each stage, over all rounds; default some thousands.
        batch: samples per step.
        graph: launch a step on a GPU as a CUDA graph.
    """

    preset: str
    bundle: Path
    work: Path
    device: str
    steps: int | None
    batch: int
    graph: bool

    def folder(self, stage: str) -> Path:
        """Folder of a stage's run."""
        return self.work / stage

    @property
    def vae_file(self) -> Path:
        """Weights of the VAE."""
        return self.folder("vae") / VAE_FILE

    @property
    def data(self) -> DataConfig:
        """The bundle, in the form that all stages use."""
        recipe = read_pretrain(Path("demo")).data if self.preset == "demo" else DataConfig()
        return dataclasses.replace(recipe, videos=(str(self.bundle),), cache=str(self.work / "latents"))

    def config(self, stage: str, seconds: float | None = None) -> Any:
        """Configuration of a stage; `seconds` limits its training in this call."""
        read = {"vae": read_pretrain_vae, "memory": read_pretrain, "continuation": read_finetune}[stage]
        recipe = read(Path({"vae": "vae", "memory": "demo", "continuation": "demo_continue"}[stage]))
        cuda = self.device == "cuda"
        optimisation: TrainConfig = dataclasses.replace(
            recipe.optimisation,
            **_ON_GPU,
            steps=self.steps or _STEPS[stage],
            batch=self.batch,
            checkpoint_every=1000 if cuda else 10,
            max_seconds=seconds,
            draw_ahead=max(1, (os.cpu_count() or 1) - 4) if cuda else 0,
            cuda_graph=cuda and self.graph,
            device=self.device,
        )
        changes: dict[str, Any] = {"output": str(self.folder(stage)), "data": self.data, "optimisation": optimisation}
        if stage == "memory":
            changes["vae"] = str(self.vae_file)
        if stage == "continuation":
            changes["start"] = str(self.folder("memory"))
        if self.preset == "tiny":
            changes |= _tiny(stage, recipe)
        return dataclasses.replace(recipe, **changes)

    def complete(self, stage: str) -> bool:
        """Whether a stage has done all its steps and has written its results."""
        made = {self._weights(stage), self.folder(stage) / (VAE_FILE if stage == "vae" else MODEL_FILE)}
        return self.steps_done(stage) >= self.config(stage).optimisation.steps and all(map(Path.is_file, made))

    def train(self, stage: str, seconds: float) -> None:
        """Trains a stage for this number of seconds, unless it is complete."""
        if not self.complete(stage):
            _TRAIN[stage](self.config(stage, seconds))

    def steps_done(self, stage: str) -> int:
        """Number of steps of a stage in its folder."""
        folder = self.folder(stage) / "checkpoints"
        last = checkpoint.newest(folder)
        return checkpoint.step_of(last) if last else checkpoint.first_step(folder)

    def export(self, stages: dict[str, Any], scratch: Path) -> dict[str, Path]:
        """Weights and curves of the stages by their exported names; the memory's weights in 8 bits, in `scratch`."""
        files = {}
        for stage in stages:
            file = self._weights(stage)
            if stage == "memory":
                model = load_model(file)
                file = save_model(scratch / MODEL_FILE, model, model.extra, dtype="int8")
            files[_WEIGHTS[stage]] = file
            files[f"{stage}.{CURVE}"] = self.folder(stage) / CURVE
        return files

    def begin_with(self, stage: str, step: int, exported: Path) -> None:
        """Lets a stage continue from what another machine has exported."""
        folder, weights = self.folder(stage), WeightsFile(exported / _WEIGHTS[stage]).read()
        shutil.rmtree(folder, ignore_errors=True)
        if stage == "continuation":
            weights = {f"dit.{name}": tensor for name, tensor in weights.items()}
        else:
            model = self.config("memory").model
            made = skeleton(lambda: CausalVAE(model.vae) if stage == "vae" else MemoryModel(model))
            weights = {name: weights[name] for name, _ in made.named_parameters()}
        checkpoint.begin_with(folder / "checkpoints", step, weights)
        for name, target in ((_WEIGHTS[stage], _WEIGHTS[stage]), (f"{stage}.{CURVE}", CURVE)):
            with replacing(folder / target) as part:
                shutil.copyfile(exported / name, part)
        if stage != "vae":
            shutil.copyfile(exported / VAE_FILE, folder / VAE_FILE)

    def _weights(self, stage: str) -> Path:
        return self.folder(stage) / _WEIGHTS[stage]


def _tiny(stage: str, recipe: Any) -> dict[str, Any]:
    """The changes for the tiny preset: a small model, and short samples for short films."""
    if stage == "vae":
        return {"model": PRESETS["tiny"], "frames": 8}
    if stage == "memory":
        sampling = dataclasses.replace(recipe.sampling, history=8, queries=2)
        return {"model": PRESETS["tiny"], "sampling": sampling, "linear_start": 0}
    return {"sampling": dataclasses.replace(recipe.sampling, history=8, targets=2, window=2, max_change=None)}


def write_curves(path: Path, curves: dict[str, list[list[float]]]) -> None:
    """Plots the loss of every stage against its steps.

    Args:
        path: PNG, PDF or SVG file to write.
        curves: pairs of step and loss by stage; at least one stage.
    """
    with plot(path, 2, 2.2, "Loss of every stage of a training") as figure:
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (stage, points) in zip(panels, curves.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=0.8)
            axes.set(title=stage, xlabel="step", ylabel="loss")
            log_axis(axes, "y")
