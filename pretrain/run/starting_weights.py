"""What a new run starts from: random weights, or those that `encoder.weights` names.

Starting and resuming are two things. Weights are read once, when the run is made, and kept in its folder: a
job needs neither the network nor the file they came from, and every rank begins with the same ones. As soon
as there is a checkpoint, the run goes on from that and never looks at them again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from configs.errors import ConfigError, RunError
from data_pipeline.files import write_whole
from pretrain import checkpoint, collectives, encoders
from pretrain.collectives import from_main
from pretrain.encoders import EncoderConfig, registered, reopen, weights
from pretrain.encoders.weights import Loaded
from pretrain.objective import Objective
from pretrain.run.folder import RunFolder

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


def require_reopenable(config: EncoderConfig, image_size: tuple[int, int]) -> None:
    """Refuse an architecture of one's own that nobody could open an export of, before it is trained.

    A fresh process is given random weights of it, as an export has them. Raises `ConfigError`.
    """
    if not registered.is_own(config.name):
        return
    modules = registered.origins(config.name, config.imports)
    if "__main__" in modules:
        raise ConfigError(
            f"encoder.name: {config.name} is registered by the program itself, which no other process can "
            f"import; "
            "put it into a module of its own and name that in encoder.imports"
        )
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
        encoder = encoders.build(config, image_size).eval()
        images = torch.randn(2, config.channels, *image_size)
        with torch.no_grad():
            expected = encoders.features(encoder, images)
        problem = _reopened_otherwise(config, encoder, images, expected, Path(scratch), modules)
    if problem:
        raise ConfigError(
            f"encoder.name: an export of {config.name} couldn't be opened by importing {', '.join(modules)} "
            f"in a fresh "
            f"process: {problem}; the module has to be installed or on PYTHONPATH, and to build the model "
            f"with timm's "
            "build_model_with_cfg, which loads weights"
        )


def _reopened_otherwise(
    config: EncoderConfig,
    encoder: nn.Module,
    images: Tensor,
    expected: Tensor,
    folder: Path,
    modules: Sequence[str],
) -> str:
    """What goes wrong when a fresh process opens the encoder; empty where it computes the same."""
    weights = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    size = [config.channels, *images.shape[2:]]
    described = {
        "architecture": config.name,
        "num_classes": 0,
        "model_args": encoders.arguments(config, (size[1], size[2])),
        "pretrained_cfg": {"num_classes": 0, "custom_load": False, "input_size": size},
    }
    (folder / "config.json").write_text(json.dumps(described))
    inputs, outputs = folder / "inputs.safetensors", folder / "outputs.safetensors"
    save_file({"images": images}, inputs)
    command = [sys.executable, "-P", reopen.__file__, f"local-dir:{folder}", str(inputs), str(outputs)]
    done = subprocess.run([*command, *modules], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1][:300]
    same = torch.allclose(load_file(outputs)["features"], expected, atol=1e-5)
    return "" if same else "it computes something else, as if its weights weren't loaded"


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
