"""A Slurm cluster of several nodes on this machine, as the user that runs the tests."""

import contextlib
import getpass
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODE = "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/linear
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
SlurmdTimeout=0
SchedulerParameters=sched_interval=2,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def missing() -> str:
    """Why there can be no cluster; "" if there can."""
    names = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"{', '.join(names)} not installed (Debian: slurm-wlm)" if names else ""


class Cluster:
    """slurmctld and a slurmd per node; use as a context manager.

    Args:
      folder: of state and logs, not too deep (sockets).
      num_nodes: n1, n2, ...
    """

    def __init__(self, folder: pathlib.Path, num_nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{number}" for number in range(1, num_nodes + 1)]
        host = socket.gethostname().split(".")[0]
        ports = free_ports(num_nodes + 1)
        nodes = [
            NODE.format(number=number, host=host, port=ports[number])
            for number in range(1, num_nodes + 1)
        ]
        text = CONF.format(
            host=host,
            port=ports[0],
            user=getpass.getuser(),
            folder=folder,
            nodes="\n".join(nodes),
        )
        for name in ("state", *self.names):
            (folder / name).mkdir(parents=True)
        (folder / "slurm.conf").write_text(text)
        bin_folder = pathlib.Path(sys.executable).parent
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{bin_folder}:{PATH}",
        }
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "Cluster":
        self._start("slurmctld", "-D")
        for name in self.names:
            self._start("slurmd", "-D", "-N", name)
        try:
            self.wait(
                lambda: self.run("sinfo", "-h", "-o", "%D %t"),
                f"{len(self.names)} idle".__eq__,
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        deadline = time.monotonic() + 60  # no job outlives its cluster
        while self.run("squeue", "-h", check=False) and time.monotonic() < deadline:
            self.run("scancel", "--user", getpass.getuser(), check=False)
            time.sleep(1)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=self.folder
            )
        self.daemons.append(daemon)

    def run(self, *command: str, check: bool = True, **kwargs) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(
            command,
            env=self.environment | kwargs.pop("env", {}),
            capture_output=True,
            text=True,
            **kwargs,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd and its steps, as when the machine is lost."""
        self.daemons[1 + self.names.index(name)].kill()
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    command = (entry / "cmdline").read_bytes()
                    log = (self.folder / f"{name}.log").as_posix()
                    if b"slurmstepd" in command and _has_open(entry, log):
                        os.kill(int(entry.name), signal.SIGKILL)

    def hurry(self, job: str) -> None:
        """Start a job that was queued again: Slurm has it wait for two minutes."""
        if self.state(job).get("Reason") == "BeginTime":
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def state(self, job: str) -> dict[str, str]:
        """Return the fields of a job that scontrol shows."""
        text = self.run("scontrol", "show", "job", job, "--oneliner", check=False)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait(self, read, ready, seconds: float = 60.0, note=lambda: ""):
        """Call `read` until `ready` of it is true; return it."""
        deadline = time.monotonic() + seconds
        while not ready(value := read()):
            assert time.monotonic() < deadline, f"{value} {note()}"
            time.sleep(0.2)
        return value


def _has_open(entry: pathlib.Path, file: str) -> bool:
    """Return True if a process has a file open."""
    return any(os.readlink(link) == file for link in (entry / "fd").iterdir())


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
