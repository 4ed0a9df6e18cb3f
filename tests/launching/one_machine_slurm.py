"""A real Slurm on this machine, in a folder of its own: slurmctld, slurmd and munged.

It needs Debian's packages slurm-wlm and munge, and root: slurmd starts jobs as other users. Nothing
outside the folder is written, and nothing of a Slurm that runs here already is touched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

COMMANDS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
MUNGE_FILES = ("socket", "pid-file", "log-file", "seed-file")
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not on the PATH of every shell

# Two places for jobs, so that two of them can go on at once whatever the machine has. A task is
# not bound to a core, and a requeued job waits for `cred_expire` seconds instead of two minutes.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdParameters=config_overrides
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why no Slurm can be started here; "" if one can."""
    missing = [name for name in COMMANDS if not shutil.which(name, path=_path())]
    if missing:
        return f"needs Slurm (apt-get install slurm-wlm munge): no {', '.join(missing)} here"
    if os.geteuid() != 0:
        return "needs root, to start a Slurm of its own"
    return ""


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """Start the daemons; yield the environment in which commands find them. Then end them."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    conf, key = folder / "slurm.conf", folder / "munge.key"
    controller, daemon = _free_ports(2)
    conf.write_text(CONF.format(host=host, folder=folder, controller=controller, daemon=daemon))
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _path()}
    munge = [f"--{name}={folder}/munge.{name}" for name in MUNGE_FILES]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    with contextlib.ExitStack() as started:
        for command in daemons:
            started.enter_context(_started(command, environment, folder))
            if command[0] == "munged":
                _wait_for((folder / "munge.socket").exists, "munged", folder)
        _wait_for(lambda: _is_idle(environment), "the node", folder)
        yield environment


@contextlib.contextmanager
def _started(command: list[str], environment: dict, folder: pathlib.Path) -> Iterator[None]:
    with open(folder / f"{command[0]}.printed", "w") as printed:
        process = subprocess.Popen(command, env=environment, stdout=printed, stderr=printed)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_idle(environment: dict[str, str]) -> bool:
    asked = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
    )
    return asked.stdout.strip() == "idle"


def _wait_for(holds, what: str, folder: pathlib.Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            logs = [*folder.glob("*.log"), *folder.glob("*.printed")]
            text = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in logs)
            raise RuntimeError(f"{what} did not start within {seconds} s\n{text}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _path() -> str:
    """The PATH, with this Python's folder and those of daemons."""
    own = str(pathlib.Path(sys.executable).parent)
    return ":".join((own, os.environ["PATH"], *SYSTEM_FOLDERS))
