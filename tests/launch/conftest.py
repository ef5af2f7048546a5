"""The command line, called in the test's own process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from launch.cli.main import main

Said = tuple[int, str, str]


@pytest.fixture
def keel(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Call the command in this process; gives exit code, standard output and standard error."""

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["keel", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call
