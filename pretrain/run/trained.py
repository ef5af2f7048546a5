"""A model read back from a run folder: on any machine, without process group, engine or training data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import loading
from configs.errors import RunError
from data_pipeline.facts import facts_of
from data_pipeline.types import ViewSpec
from pretrain import checkpoint, encoders
from pretrain.config import RunConfig
from pretrain.engines.storage import read_model
from pretrain.judging import schedule
from pretrain.judging.subject import evaluation_view
from pretrain.objective import BuildContext, Objective, Weights
from pretrain.run.folder import RunFolder
from pretrain.tracking import jsonl

_ENCODER = "encoder"


@dataclass(frozen=True)
class Trained:
    """An encoder with a checkpoint's weights, and what is known of where they came from."""

    folder: RunFolder
    config: RunConfig
    checkpoint: Path
    encoder: nn.Module  # float32, on the CPU, in evaluation mode
    step: int
    samples: int
    weights: Weights = "model"

    @property
    def image_size(self) -> tuple[int, int]:
        return image_size(self.config)

    @property
    def view(self) -> ViewSpec:
        """How evaluations show an image to the encoder."""
        return evaluation_view(self.config.views(self.image_size)[0], self.config.encoder.crop)

    def facts(self) -> dict[str, Any]:
        """For a model card: what was trained on what, for how long, and how it was judged at that step.

        A run's evaluations judge the encoder that the gradient trains; of another one nothing is known.
        """
        state = self.folder.read_state()
        rows = schedule.read(self.folder.root / "evaluations.jsonl") if self.weights == "model" else []
        return {
            "objective": self.config.objective.name,
            "weights": self.weights,
            "run": state.get("id"),
            "step": self.step,
            "samples": self.samples,
            "data_hash": state.get("manifest_hash"),
            "commit": state.get("commit"),
            "evaluations": {row["name"]: row["values"] for row in rows if row["step"] == self.step},
        }

    def recipe(self) -> dict[str, Any]:
        """The settings that decide what the weights are, as in a config file, without local paths."""
        settings = self.config.model_dump(mode="json")
        chosen = {name: settings[name] for name in ("objective", "encoder", "optimizer")}
        if (start := self.config.encoder.weights) is not None and Path(start).is_absolute():
            chosen["encoder"]["weights"] = Path(start).name
        chosen["data"] = {"image_size": settings["data"]["image_size"]}
        train = ("duration", "batch_size", "precision")
        return chosen | {
            "train": {name: settings["train"][name] for name in train},
            "run": {"seed": settings["run"]["seed"]},
        }

    def losses(self) -> list[tuple[int, float]]:
        """(samples seen, loss) of every row of metrics up to the checkpoint's step, NaN left out."""
        rows = jsonl.rows(self.folder.root / "metrics.jsonl")
        return [
            (row["samples"], row["loss"])
            for row in rows
            if row["step"] <= self.step and math.isfinite(row.get("loss") or math.nan)
        ]


def read(run: Path, step: int | None = None, weights: Weights = "model") -> Trained:
    """An encoder of a run's newest valid checkpoint, or of the one at `step`, as it was in training.

    `weights`: "model" is what the gradient trains; "teacher" and "ema" are what the objective says they are
    (`ObjectiveConfig.slow_encoders`). Raises `RunError`, also where it has none.
    """
    folder, config = _run(run)
    module = _module(run, config, weights)
    directory = _checkpoint(run, folder, step)
    encoder = encoders.build(config.encoder, image_size(config))
    saved, prefix = read_model(directory), f"{module}."
    own = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    _load(encoder, own, directory)
    extra = checkpoint.read_extra(directory)
    return Trained(folder, config, directory, encoder.eval(), extra["step"], extra["samples"], weights)


def _module(run: Path, config: RunConfig, weights: Weights) -> str:
    """The submodule of the objective that holds them."""
    there: dict[Weights, str] = {"model": _ENCODER, **config.objective.slow_encoders}
    if weights not in there:
        raise RunError(
            f"{run}: has no {weights} weights: {config.objective.name} keeps no such copy of its encoder; "
            f"allowed: --weights {' or '.join(there)}"
        )
    return there[weights]


def read_objective(trained: Trained) -> Objective:
    """The whole objective of `trained`, decoder and all, in evaluation mode; its manifest must be there."""
    objective = new_objective(trained.config)
    _load(objective, read_model(trained.checkpoint), trained.checkpoint)
    return objective.eval()


def new_objective(config: RunConfig) -> Objective:
    """The objective as a run starts it: the same random weights from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        context = BuildContext(
            encoder=encoders.build(config.encoder, image_size(config)),
            image_size=image_size(config),
            dataset_size=facts_of(config.data).samples,
            batch_size=config.train.batch_size,
            autocast=None,
        )
        return config.objective.build(context)


def image_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) in pixels."""
    size = config.data.image_size
    return size if isinstance(size, tuple) else (size, size)


def _run(run: Path) -> tuple[RunFolder, RunConfig]:
    folder = RunFolder(run.expanduser().absolute())
    if not folder.exists():
        raise RunError(f"{run}: not a run folder (no config.yaml in it); train one with keel train")
    return folder, loading.load(folder.config_file, RunConfig)


def _checkpoint(run: Path, folder: RunFolder, step: int | None) -> Path:
    if step is not None:
        return checkpoint.at_step(folder.root, step)
    newest = checkpoint.latest(folder.root)
    if newest is None:
        raise RunError(f"{run}: has no valid checkpoint yet; train it on with keel train")
    return newest


def _load(module: nn.Module, weights: dict[str, torch.Tensor], directory: Path) -> None:
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    # Buffers that a state dict leaves out (fixed positions) may still be in a checkpoint.
    unknown = [name for name in unknown if name not in dict(module.named_buffers())]
    if missing or unknown:
        names = ", ".join([*(f"lacks {n}" for n in missing[:3]), *(f"has unknown {n}" for n in unknown[:3])])
        raise RunError(f"{directory}: isn't a checkpoint of this run's model: it {names}")
    module.load_state_dict({name: weights[name] for name in own}, strict=True)
