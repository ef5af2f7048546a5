"""A model read back from a run folder: on any machine, without process group, engine or training data."""

from __future__ import annotations

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
from pretrain.evaluators import schedule
from pretrain.evaluators.subject import evaluation_view
from pretrain.folder import RunFolder
from pretrain.types import BuildContext, Objective

_ENCODER = "encoder."


@dataclass(frozen=True)
class Trained:
    """An encoder with a checkpoint's weights, and what is known of where they came from."""

    folder: RunFolder
    config: RunConfig
    checkpoint: Path
    encoder: nn.Module  # float32, on the CPU, in evaluation mode
    step: int
    samples: int

    @property
    def image_size(self) -> tuple[int, int]:
        return image_size(self.config)

    @property
    def view(self) -> ViewSpec:
        """How evaluations show an image to the encoder."""
        return evaluation_view(self.config.objective.views(self.image_size)[0], self.config.encoder.crop)

    def facts(self) -> dict[str, Any]:
        """For a model card: what was trained on what, for how long, and how it was judged at that step."""
        state = self.folder.read_state()
        rows = schedule.read(self.folder.root / "evaluations.jsonl")
        return {
            "objective": self.config.objective.name,
            "run": state.get("id"),
            "step": self.step,
            "samples": self.samples,
            "data_hash": state.get("manifest_hash"),
            "commit": state.get("commit"),
            "evaluations": {row["name"]: row["values"] for row in rows if row["step"] == self.step},
        }


def read(run: Path, step: int | None = None) -> Trained:
    """The encoder of a run's newest valid checkpoint, or of the one at `step`. Raises `RunError`."""
    folder, directory = _checkpoint(run, step)
    config = loading.load(folder.config_file, RunConfig)
    encoder = encoders.build(config.encoder, image_size(config))
    weights = read_model(directory)
    own = {name.removeprefix(_ENCODER): value for name, value in weights.items() if name.startswith(_ENCODER)}
    _load(encoder, own, directory)
    extra = checkpoint.read_extra(directory)
    return Trained(folder, config, directory, encoder.eval(), extra["step"], extra["samples"])


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


def _checkpoint(run: Path, step: int | None) -> tuple[RunFolder, Path]:
    folder = RunFolder(run.expanduser().absolute())
    if not folder.exists():
        raise RunError(f"{run}: not a run folder (no config.yaml in it); train one with keel train")
    if step is None:
        newest = checkpoint.latest(folder.root)
        if newest is None:
            raise RunError(f"{run}: has no valid checkpoint yet; train it on with keel train")
        return folder, newest
    return folder, checkpoint.at_step(folder.root, step)


def _load(module: nn.Module, weights: dict[str, torch.Tensor], directory: Path) -> None:
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    # Buffers that a state dict leaves out (fixed positions) may still be in a checkpoint.
    unknown = [name for name in unknown if name not in dict(module.named_buffers())]
    if missing or unknown:
        names = ", ".join([*(f"lacks {n}" for n in missing[:3]), *(f"has unknown {n}" for n in unknown[:3])])
        raise RunError(f"{directory}: isn't a checkpoint of this run's model: it {names}")
    module.load_state_dict({name: weights[name] for name in own}, strict=True)
