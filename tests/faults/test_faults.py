"""Whatever happens to a run: it comes to its end, with every loss and sample of the uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import Ranks
from tests.faults.driver import EVERY_FAULT, Case, Run, check, make_data, play, table


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("faults") / "digits")


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, data: Path, request: pytest.FixtureRequest) -> Run:
    """The uninterrupted run, on two ranks."""
    server = request.getfixturevalue("_fork_server")
    run = Run(tmp_path_factory.mktemp("straight"), data, server.run)
    assert run.start(2) == "done"
    return run


TORTURE_ONLY = ("kill after writing", "kill before publishing", "file removed", "index truncated")
"""So much like another one that the short form does without."""


@pytest.mark.parametrize("fault", [name for name in EVERY_FAULT if name not in TORTURE_ONLY])
def test_a_run_survives(ranks: Ranks, tmp_path: Path, data: Path, straight: Run, fault: str) -> None:
    run = Run(tmp_path, data, ranks, workers=int(fault == "worker killed"))
    case = play(run, Case([fault], seed=EVERY_FAULT.index(fault)))
    if "kill" in fault and fault not in ("worker killed", "kill at a random time"):
        assert "killed" in case.attempts  # the fault did happen
    check(run, case, straight)


@pytest.mark.torture
@pytest.mark.timeout(7200)
def test_torture(
    ranks: Ranks,
    tmp_path_factory: pytest.TempPathFactory,
    data: Path,
    straight: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """KEEL_TORTURE_CASES runs (200), each with one to three faults; KEEL_TORTURE_SEED (0) chooses them."""
    count, seed = (
        int(os.environ.get(f"KEEL_TORTURE_{name}", d)) for name, d in (("CASES", 200), ("SEED", 0))
    )
    cases: list[Case] = []
    began = time.monotonic()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        names = [chance.choice(EVERY_FAULT) for _ in range(chance.randint(1, 3))]
        run = Run(tmp_path_factory.mktemp("case"), data, ranks, workers=chance.choice([0, 1]))
        cases.append(Case(names, number))
        try:
            play(run, cases[-1])
            check(run, cases[-1], straight)
        except Exception as error:  # whatever it is, the others are played and the table is printed
            cases[-1].wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        shutil.rmtree(run.root.parent)
        with capsys.disabled():
            seconds = time.monotonic() - began
            print(f"{number + 1}/{count} after {seconds:.0f} s: {cases[-1].told()}", flush=True)
    with capsys.disabled():
        print(f"\n{count} runs, seed {seed}\n{table(cases)}", flush=True)
    assert [case for case in cases if case.wrong] == []
