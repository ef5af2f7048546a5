"""Which marked tests run where.

`gpu` needs a CUDA device; `torture` runs under KEEL_TORTURE=1 only (make torture). Tests that may skip on a
desk must not in CI: KEEL_REQUIRED_MARKS="slurm chromium" makes skips of tests with those marks failures.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Torture is left out unless asked for; it wouldn't tell anybody anything to list it as skipped."""
    if os.environ.get("KEEL_TORTURE") == "1":
        return
    torture = [item for item in items if item.get_closest_marker("torture")]
    if torture:
        config.hook.pytest_deselected(items=torture)
        items[:] = [item for item in items if item not in torture]


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
