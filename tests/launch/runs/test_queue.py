"""SLURM's answers as it gives them (22.05's own output, by stand-ins), its silence, and its absence."""

from __future__ import annotations

import shutil
import stat
import time
from pathlib import Path

import pytest

from configs.errors import RunError
from launch.runs import queue
from launch.runs.queue import GONE, JobState


class Site:
    """A folder of stand-ins for SLURM's commands that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"

    def command(self, name: str, body: str) -> None:
        script = self.folder / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n{body}\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def says(self, name: str, out: str = "", *, err: str = "", code: int = 0) -> None:
        (self.folder / f"{name}.out").write_text(out)
        self.command(name, f"cat {self.folder}/{name}.out; echo '{err}' >&2; exit {code}")

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("squeue", "sacct", "scancel", "scontrol"):  # hides those of this machine
        Site(tmp_path).says(name, err=f"{name}: no", code=1)
    return Site(tmp_path)


SQUEUE = """\
1|COMPLETED|None|node[1-2]|0|0|keel-x|
3|FAILED|NonZeroExitCode|node1|0|1792|keel-x|
2_2|PENDING|JobArrayTaskLimit||1|0|keel-x|
2_3|PENDING|JobArrayTaskLimit||0|0|keel-x|
5|CANCELLED|None|node1|0|15|keel-x|
2_0|RUNNING|None|node1|2|0|keel-x|
"""


def test_one_squeue_answers_for_all_members(site: Site) -> None:
    site.says("squeue", SQUEUE)
    found = queue.states(["1", "3", "2_0", "2_2", "5"])
    assert found == {
        "1": JobState("COMPLETED", "", "node[1-2]", 0, 0, "keel-x"),
        "3": JobState("FAILED", "NonZeroExitCode", "node1", 0, 7, "keel-x"),
        "2_0": JobState("RUNNING", "", "node1", 2, None, "keel-x"),
        "2_2": JobState("PENDING", "JobArrayTaskLimit", "", 1, None, "keel-x"),
        "5": JobState("CANCELLED", "", "node1", 0, -15, "keel-x"),
    }
    assert [call.split()[0] for call in site.called()] == ["squeue"]
    assert "--jobs=1,2,3,5" in site.called()[0]
    assert found["2_2"].waiting and found["2_0"].active and not found["3"].active


def test_an_id_that_was_given_away_again_is_another_job(site: Site) -> None:
    site.says("squeue", "7|RUNNING|None|node1|0|0|somebody|s else|\n")
    job = queue.states(["7"])["7"]
    assert job.name == "somebody|s else"
    assert queue.known_as(job, "keel-run") == JobState(GONE)
    assert queue.known_as(job, job.name) is job and queue.known_as(job, None) is job
    assert queue.known_as(None, "keel-run") is None
    # The accounting was seen to have another name for the same job, which proves nothing.
    recorded = JobState("RUNNING", name=job.name, accounted=True)
    assert queue.known_as(recorded, "keel-run") is recorded


def test_the_cluster_says_its_name_and_how_long_arrays_may_be(site: Site) -> None:
    config = "Configuration data\nClusterName             = mini\nMaxArraySize            = 1001\n"
    site.says("scontrol", config + "SlurmctldHost[0]        = a\n")
    assert queue.site() == queue.Site("mini", 1001)
    site.says("scontrol", err="scontrol: no", code=1)
    assert queue.site() == queue.Site(None, None)


def test_pending_ranges_are_written_out(site: Site) -> None:
    site.says("squeue", "7_[2-5,8%2]|PENDING|Resources||0|0|x|\n7_1|RUNNING|None|n1|0|0|x|\n")
    found = queue.states([f"7_{number}" for number in range(1, 9)])
    assert {job for job, state in found.items() if state.waiting} == {"7_2", "7_3", "7_4", "7_5", "7_8"}
    assert found["7_1"].state == "RUNNING"
    assert found["7_6"].state == GONE
    assert queue.expanded("9_[0-6:3]") == ["9_0", "9_3", "9_6"]
    assert queue.expanded("9_[1,3-4,...]") == ["9_1", "9_3", "9_4"]
    assert queue.expanded("9_4") == ["9_4"]
    assert queue.expanded("9+1") == []


def test_sacct_is_asked_once_for_what_squeue_has_forgotten(site: Site) -> None:
    site.says("squeue", "2_0|RUNNING|None|node1|0|0|x|\n")
    rows = (
        "8|CANCELLED by 1000|None|node2|0:15|a|b",
        "9|NODE_FAIL|None|node1|1:0|x",
        "2_[1-3]|PENDING|None|None assigned|0:0|x",
    )
    site.says("sacct", "\n".join(rows) + "\n")
    found = queue.states(["2_0", "2_1", "8", "9", "10"])
    assert found["8"] == JobState("CANCELLED", "by 1000", "node2", 0, -15, "a|b")
    assert found["9"] == JobState("NODE_FAIL", "", "node1", 0, 1, "x")
    assert found["2_1"] == JobState("PENDING", name="x")
    assert found["10"] == JobState(GONE)
    assert [call.split()[0] for call in site.called()] == ["squeue", "sacct"]


def test_an_unknown_id_alone_is_an_answer(site: Site) -> None:
    site.says("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    assert queue.states(["99"]) == {"99": JobState(GONE)}


def test_without_accounting_a_forgotten_job_is_gone_and_a_known_one_known(site: Site) -> None:
    site.says("squeue", "2_0|RUNNING|None|node1|0|0|x|\n")
    site.says("sacct", err="Slurm accounting storage is disabled", code=1)
    assert queue.states(["2_0", "3"]) == {
        "2_0": JobState("RUNNING", "", "node1", name="x"),
        "3": JobState(GONE),
    }


def test_a_dead_controller_leaves_what_accounting_knows(site: Site) -> None:
    site.says("squeue", err="slurm_load_jobs error: Unable to contact slurm controller", code=1)
    site.says("sacct", "3|COMPLETED|None|node1|0:0|x\n4|NODE_FAIL|None|node1|1:0|x\n")
    # What SLURM runs again is NODE_FAIL in the accounting for a while, so that word isn't taken.
    assert queue.states(["2_0", "3", "4"]) == {"3": JobState("COMPLETED", "", "node1", 0, 0, "x")}


def test_without_slurm_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.states(["1"]) == {}
    assert queue.time_left("1") is None
    with pytest.raises(RunError, match="scancel: isn't here"):
        queue.cancel(["1"])


def test_local_ids_and_nothing_at_all_ask_nobody(site: Site) -> None:
    assert queue.states([]) == {}
    assert queue.states(["local-7"]) == {}
    assert site.called() == []


def test_a_hanging_command_is_ended_with_its_children(site: Site) -> None:
    """A site's wrapper leaves a child that holds the pipe open."""
    for name in ("squeue", "sacct", "scontrol"):
        site.command(name, "sleep 300 & echo $! > $0.child; wait")
    began = time.monotonic()
    assert queue.states(["1"], timeout=0.5) == {}
    with pytest.raises(RunError, match=r"scontrol: SLURM didn't answer in 0.5 s"):
        queue.requeue("1", timeout=0.5)
    assert time.monotonic() - began < 60
    for name in ("squeue", "sacct", "scontrol"):
        child = Path("/proc") / (site.folder / f"{name}.child").read_text().strip() / "stat"
        assert not child.exists() or b") Z " in child.read_bytes()


def test_cancelling_what_has_ended_is_fine(site: Site) -> None:
    site.says(
        "scancel", err="scancel: error: Kill job error on job id 2: Job/step already completing", code=1
    )
    queue.cancel(["2"], to_save=True)
    site.says("scancel", err="scancel: error: Access/permission denied", code=1)
    with pytest.raises(RunError, match=r"scancel: SLURM refused: .*permission denied"):
        queue.cancel(["2"])
    assert site.called() == ["scancel --signal=TERM 2", "scancel 2"]


def test_a_requeue_outlives_its_own_signal(site: Site) -> None:
    """What `scontrol requeue` sends to the job it is called from mustn't end it half-way."""
    site.command("scontrol", "kill -TERM $$; kill -CONT $$; echo done >> $0.log")
    queue.requeue("12_3")
    assert (site.folder / "scontrol.log").read_text() == "done\n"
    assert site.called() == ["scontrol requeue 12_3"]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("1:57|\n", 117.0),
        ("365-00:00:01|", 31_536_001.0),
        ("2:00:00|", 7200.0),
        ("UNLIMITED|", None),
        ("", None),
    ],
)
def test_time_left(site: Site, said: str, seconds: float | None) -> None:
    site.says("squeue", said)
    assert queue.time_left("5") == seconds


def test_the_users_own_formats_are_left_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    site.command("squeue", '[ -z "$SQUEUE_FORMAT" ] && echo "4|RUNNING|None|n1|0|0|x|"')
    assert queue.states(["4"])["4"].state == "RUNNING"


def test_a_script_is_judged_by_slurms_own_words(site: Site, tmp_path: Path) -> None:
    site.command(
        "sbatch", 'grep -q gpu "$2" && { echo "sbatch: error: invalid partition" >&2; exit 1; }; echo ok >&2'
    )
    assert queue.would_accept("#!/bin/sh\n") == (True, "ok")
    assert queue.would_accept("#SBATCH -p gpu\n") == (False, "sbatch: error: invalid partition")
    site.says("sbatch", err="sbatch: error: Unable to contact slurm controller", code=1)
    assert queue.would_accept("")[0] is None
    (tmp_path / "sbatch").unlink()
    assert shutil.which("sbatch") is not None or queue.would_accept("") == (None, "sbatch isn't here")
