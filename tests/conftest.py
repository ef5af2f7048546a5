"""Set-up shared by all tests: the CPU, one thread, torchvision's shim, and forked ranks."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if os.environ.get("KEEL_GPU") != "1":  # set by make gpu-check; elsewhere a GPU would be half used
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that tests can import tests.forkserver

import pytest
import torch

from pretrain.encoders.torchvision_compat import ensure_torchvision
from tests.forkserver import ForkServer
from tests.selection import (  # noqa: F401  hooks
    pytest_collection_modifyitems,
    pytest_report_to_serializable,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_xdist_make_scheduler,
)

# A CI started by nohup or as a shell's background job would pass on that these are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
ensure_torchvision()

Ranks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def _fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def ranks(_fork_server: ForkServer) -> Ranks:
    """`ranks(n, function, **arguments)`: results of `function` on n forked ranks; see `ForkServer.run`."""
    return _fork_server.run


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and val/ manifests of handwritten digits (1,438 and 359); nobody writes there."""
    from data_pipeline import demo

    folder = tmp_path_factory.mktemp("data") / "digits"
    demo.make(demo.DemoConfig(name="digits"), folder)
    return folder
