"""What a new run starts from: random weights, or those that `encoder.weights` names.

Starting and resuming are two things. Weights are read once, when the run is made, and kept in its folder: a
job needs neither the network nor the file they came from, and every rank begins with the same ones. As soon
as there is a checkpoint, the run goes on from that and never looks at them again.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from configs.errors import ConfigError, RunError
from data_pipeline.files import write_whole
from pretrain import checkpoint, collectives, encoders
from pretrain.collectives import from_main
from pretrain.encoders import EncoderConfig, registered, weights
from pretrain.encoders.weights import Loaded
from pretrain.folder import RunFolder
from pretrain.types import Objective

log = logging.getLogger(__name__)


def opened(config: EncoderConfig, image_size: tuple[int, int]) -> tuple[nn.Module, Loaded] | None:
    """The encoder with the weights that its config names and an account of them, None where it names none.

    Raises `RunError` where they can't be read or don't fit, with what is missing and what is left over.
    """
    if config.weights is None:
        return None
    with torch.random.fork_rng(devices=[]):
        encoder = encoders.build(config, image_size)
    return encoder, weights.load(encoder, config.weights, config.weights_size)


def require_reopenable(config: EncoderConfig) -> None:
    """Refuse an architecture that nobody could open an export of, before it is trained.

    Raises `ConfigError`.
    """
    if (problem := registered.problem(config.name, config.imports)) is not None:
        raise ConfigError(f"encoder.name: {config.name} {problem}")


def keep(folder: RunFolder, config: EncoderConfig, encoder: nn.Module, loaded: Loaded) -> dict[str, Any]:
    """Put the encoder's weights into the run folder, atomically; gives what run.json tells of them."""
    content = save({name: value.contiguous() for name, value in encoder.state_dict().items()})
    try:
        write_whole(folder.starting_weights, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder.starting_weights)) from error
    found = hashlib.sha256(content).hexdigest()
    return {"source": config.weights, "taken": str(loaded), "sha256": found}


def begin(objective: Objective, folder: RunFolder, config: EncoderConfig) -> None:
    """Give the objective its starting weights, unless the run has a checkpoint already; collective.

    Says what of the encoder is drawn by chance. Raises `RunError` where the folder has lost the weights.
    """
    if (drawn := encoders.chances(objective.encoder)) and collectives.rank() == 0:
        log.warning(
            "%s: drawn by each rank from a generator of its own, not from the samples' seeds, so that "
            "losses on "
            "other numbers of ranks, and after a resume, differ a little",
            drawn,
        )
    if config.weights is None or not from_main(lambda: checkpoint.latest(folder.root) is None):
        return
    if not folder.starting_weights.exists():
        raise RunError(
            f"{folder.starting_weights}: is gone, and there is no checkpoint yet; remove {folder.root} "
            "and start the run anew"
        )
    objective.start_from(partial(_read, folder.starting_weights))
    told = folder.read_state()["starting_weights"]
    level = logging.WARNING if ";" in told["taken"] else logging.INFO  # something had to be assumed
    log.log(level, "starts from the weights of %s: %s", told["source"], told["taken"])


def _read(file: Path, encoder: nn.Module) -> None:
    encoder.load_state_dict(load_file(file), strict=True)
