"""What a new run starts from: random weights, or those that `encoder.weights` names.

Starting and resuming are two things. Weights are read once, when the run is made, and kept in its folder: a
job needs neither the network nor the file they came from, and every rank begins with the same ones. As soon
as there is a checkpoint, the run goes on from that and never looks at them again.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from configs.errors import RunError
from pretrain import checkpoint, encoders
from pretrain.collectives import from_main
from pretrain.encoders import EncoderConfig, weights
from pretrain.folder import RunFolder
from pretrain.types import Objective


def opened(config: EncoderConfig, image_size: tuple[int, int]) -> nn.Module | None:
    """The encoder with the weights that its config names, None where it names none.

    Raises `RunError` where they can't be read or don't fit, with what is missing and what is left over.
    """
    if config.weights is None:
        return None
    with torch.random.fork_rng(devices=[]):
        encoder = encoders.build(config, image_size)
    weights.load(encoder, config.weights)
    return encoder


def keep(folder: RunFolder, encoder: nn.Module) -> str:
    """Put the encoder's weights into the run folder, atomically; gives their SHA-256."""
    beside = folder.starting_weights.with_name(f".{folder.starting_weights.name}.{os.getpid()}")
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest()
    beside.replace(folder.starting_weights)
    return found


def begin(objective: Objective, folder: RunFolder, config: EncoderConfig) -> None:
    """Give the objective its starting weights, unless the run has a checkpoint already; collective.

    Raises `RunError` where the folder has lost them.
    """
    if config.weights is None or not from_main(lambda: checkpoint.latest(folder.root) is None):
        return
    if not folder.starting_weights.exists():
        raise RunError(
            f"{folder.starting_weights}: is gone, and there is no checkpoint yet; remove {folder.root} "
            "and start the run anew"
        )
    objective.start_from(partial(_read, folder.starting_weights))


def _read(file: Path, encoder: nn.Module) -> None:
    encoder.load_state_dict(load_file(file), strict=True)
