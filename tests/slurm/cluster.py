"""A real SLURM on this machine: munged, MariaDB, slurmdbd, slurmctld and two nodes, all below one folder.

Each node is a slurmd in a mount, UTS and PID namespace of its own: `hostname` says node1, and killing the
node's init takes the whole node with it, as a crash would. Needs root, `unshare` and Debian's packages
slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core; no systemd, no cgroups.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "mariadbd",
    "mariadb-install-db",
    "sbatch",
    "unshare",
)
CPUS = 4
"""Declared for each node; they need not be there."""

CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=300
MaxArraySize=5
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
JobRequeue=1
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={folder}/munge.socket
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={node1} CPUs={cpus} RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={node2} CPUs={cpus} RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL Default=NO PriorityTier=10 PreemptMode=OFF State=UP
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=only-here
StorageLoc=slurm_acct_db
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "SLURM's test cluster needs root"


class Cluster:
    """`start()`, then `environment` for anything that talks to it; `stop()` ends what it started, by pid."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._nodes: dict[int, int] = {}  # pid of each node's init

    # ---- life

    def start(self) -> None:
        ports = dict(zip(("port", "accounting", "database", "node1", "node2"), _free_ports(5), strict=True))
        names = {"folder": self.folder, "host": socket.gethostname().split(".")[0], "cpus": CPUS, **ports}
        self.folder.chmod(0o755)  # munged trusts no folder that a group may write to
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONF.format(**names))
        dbd = self.folder / "slurmdbd.conf"
        dbd.write_text(DBD_CONF.format(**names))
        dbd.chmod(0o600)
        hosts = Path("/etc/hosts").read_text() + "127.0.0.1 node1\n127.0.0.1 node2\n"
        (self.folder / "hosts").write_text(hosts)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self._daemon(
            "munged", "--foreground", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        until(lambda: (self.folder / "munge.socket").exists(), "munged answers")
        self._start_database(ports["database"])
        self._daemon("slurmdbd", "-D")
        until(lambda: _listening(ports["accounting"]), "slurmdbd listens")
        self._daemon("slurmctld", "-D")
        until(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld answers")
        for number in (1, 2):
            self.start_node(number)
        until(
            lambda: self.run("sinfo", "-h", "-p", "main", "-r", "-t", "idle", "-o", "%D") == "2", "two nodes"
        )

    def stop(self) -> None:
        with_jobs = self.run("squeue", "-h", "-o", "%A", check=False).split()
        if with_jobs:
            self.run("scancel", "--signal=KILL", *with_jobs, check=False)
            self.run("scancel", *with_jobs, check=False)
        for number in list(self._nodes):
            self.crash_node(number)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged"):
            if process := self._started.pop(name, None):
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for process in self._started.values():
            process.wait()

    # ---- nodes

    def start_node(self, number: int) -> None:
        """Boot it."""
        name = f"node{number}"
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        init = (
            f"hostname {name}; mount --bind {self.folder}/hosts /etc/hosts; "
            f"slurmd -D -b -N {name} & "
            "while :; do wait $!; sleep 1; done"  # bash as init: reaps, outlives slurmd
        )
        process = self._daemon(
            "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
            "bash", "-c", init, name=name,
        )  # fmt: skip
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until(lambda: bool(children.read_text().split()), f"{name} boots")
        self._nodes[number] = int(children.read_text().split()[0])

    def crash_node(self, number: int) -> None:
        """Kill it and all it runs."""
        os.kill(self._nodes.pop(number), signal.SIGKILL)
        self._started.pop(f"node{number}").wait()

    def kill_slurmd(self, number: int) -> None:
        """As a network cut: SLURM loses the node, and what runs there goes on."""
        init = self._nodes[number]
        for child in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "slurmd":
                os.kill(int(child), signal.SIGKILL)

    def hide(self, folder: Path) -> None:
        """Lay an empty file system over `folder` that can't be written to, as both nodes see it."""
        for init in self._nodes.values():
            mount = ("mount", "-t", "tmpfs", "-o", "ro,size=4k", "none", str(folder))
            subprocess.run(["nsenter", "--mount", "--target", str(init), *mount], check=True)

    def show(self, folder: Path) -> None:
        """Undo `hide`."""
        for init in self._nodes.values():
            subprocess.run(["nsenter", "--mount", "--target", str(init), "umount", str(folder)], check=True)

    def strays(self) -> list[str]:
        """What runs on the nodes besides slurmd and the shell that is their init: pids and command lines."""
        found: list[str] = []
        for init in self._nodes.values():
            inside = ["pgrep", "--ns", str(init), "--nslist", "pid", "-a", "."]
            listed = subprocess.run(inside, capture_output=True, text=True, check=False).stdout.splitlines()
            for line in listed:
                pid, _, command = line.partition(" ")
                if pid != str(init) and not command.startswith(("slurmd -D ", "sleep 1")):
                    found.append(line)
        return found

    def declare_down(self, number: int) -> None:
        """What SLURM would find out by itself in half a minute."""
        self.run("scontrol", "update", f"nodename=node{number}", "state=down", "reason=crash")

    def whole(self) -> None:
        """Wait until no job or process is left and both nodes are idle, undrained; raises TimeoutError."""
        until(lambda: not self.run("squeue", "-h", "-o", "%A"), "no job is left")
        until(
            lambda: self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == ["idle"] * 2,
            "idle nodes",
        )
        try:
            until(lambda: not self.strays(), "no process is left on a node", 30)
        except TimeoutError as error:
            raise TimeoutError(f"{error}: {self.strays()}") from error

    # ---- questions

    def run(self, *command: str, check: bool = True, **more: str) -> str:
        """Standard output of a command that talks to this cluster, stripped."""
        done = subprocess.run(
            command, env=self.environment | more, capture_output=True, text=True, timeout=120, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Of a job, by squeue or, when that has forgotten it, by the accounting."""
        seen = self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T", check=False)
        return seen.split()[0] if seen else self.run("sacct", "-X", "-n", "-P", "-o", "State", "-j", job)

    def logs(self) -> str:
        """The end of every daemon's log, for a failure's message."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n" + f.read_text(errors="replace")[-1500:] for f in files)

    # ---- parts

    def _daemon(self, program: str, *arguments: str, name: str | None = None) -> subprocess.Popen[bytes]:
        name = name or program
        with (self.folder / f"{name}.out.log").open("ab") as log:
            process = subprocess.Popen(
                [program, *arguments],
                env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._started[name] = process
        return process

    def _start_database(self, port: int) -> None:
        data, sock = self.folder / "mysql", self.folder / "mysql.socket"
        small = ("--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0")
        self.run(
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=socket", "--skip-name-resolve", *small,
        )  # fmt: skip
        self._daemon(
            "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={sock}",
            f"--port={port}", "--bind-address=127.0.0.1", "--skip-name-resolve", "--skip-log-bin",
            "--performance-schema=0",
            "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", *small,
        )  # fmt: skip
        client = ("mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e")
        until(lambda: bool(self.run(*client, "select 1", check=False)), "MariaDB answers")
        self.run(
            *client,
            "create database slurm_acct_db; create user 'slurm'@'127.0.0.1' identified by 'only-here'; "
            "grant all on slurm_acct_db.* to 'slurm'@'127.0.0.1'; flush privileges",
        )


def until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until `holds()`; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s, but not: {what}")
        time.sleep(0.1)


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
