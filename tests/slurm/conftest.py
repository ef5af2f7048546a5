"""One SLURM for all tests here, started with the first of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.site import Site


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets' paths must be short
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def slurm(
    _cluster: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """The cluster, which this process's own commands then mean. It has to be idle and whole afterwards,
    with no process left on its nodes.
    """
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, _cluster.environment[name])
    yield _cluster
    left = _cluster.run("squeue", "-h", "-o", "%A").split()
    if left:
        _cluster.run("scancel", *left)
    _cluster.whole()


@pytest.fixture
def site(slurm: Cluster, tmp_path: Path) -> Site:
    """Commands of the cluster that this process finds in trouble, when told to."""
    return Site(tmp_path / "site")
