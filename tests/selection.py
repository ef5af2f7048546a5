"""Which marked tests run where, and beside which others.

Under pytest-xdist (make test) the tests of a file stay in one process, for what they share, and all of
SLURM's in one, for their one cluster; those begin first, because they mostly wait.

`gpu` needs a CUDA device; `torture` runs under KEEL_TORTURE=1 only (make torture). Tests that may skip on a
desk must not in CI: KEEL_REQUIRED_MARKS="slurm chromium" makes skips of tests with those marks failures.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

SLURM = "tests/slurm/"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Torture is left out unless asked for; it wouldn't tell anybody anything to list it as skipped."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: _together(item.nodeid) != SLURM)
    if os.environ.get("KEEL_TORTURE") == "1":
        return
    torture = [item for item in items if item.get_closest_marker("torture")]
    if torture:
        config.hook.pytest_deselected(items=torture)
        items[:] = [item for item in items if item not in torture]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files go to processes whole, in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _together(nodeid)

    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """What tests print may be names in any bytes, which can't be sent from process to process."""
    return _sendable((yield))


def _sendable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _sendable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_sendable, value))
    return value


def _together(nodeid: str) -> str:
    """What has to run in one process: a file, or SLURM's folder."""
    file = nodeid.split("::", 1)[0]
    return SLURM if file.startswith(SLURM) else file


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU, or where the session was set up for the CPU."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")
        if os.environ.get("DS_ACCELERATOR") == "cpu":
            pytest.skip("this session runs on the CPU; make gpu-check runs the GPU tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """Turn a skip of a required test into a failure."""
    report = yield
    required = [m for m in os.environ.get("KEEL_REQUIRED_MARKS", "").split() if item.get_closest_marker(m)]
    if report.skipped and required:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: {required[0]} tests are required here, but: {report.longrepr}"
    return report
