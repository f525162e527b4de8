"""The cluster's configuration files."""

from __future__ import annotations

from pathlib import Path

from tools.lab.state import CLUSTER, CONTROLLER, USER, State

CPUS, MEMORY_MB, GPUS = 8, 16000, 4
"""Simulated resources per node."""
FREEZER = Path("/sys/fs/cgroup/freezer")
"""If this exists, Slurm tracks processes by cgroup, as real clusters do; otherwise by parent."""


def tracks_by_cgroup() -> bool:
    """Return whether Slurm itself finds a job's orphaned processes."""
    return FREEZER.is_dir()


def write_configuration(state: State) -> None:
    """Write all files, from the state alone."""
    folder = state.folder
    machines = ["login", CONTROLLER, *state.names]
    hosts = "".join(f"{state.address(name)} {name}\n" for name in machines)
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
    user = f"{USER}:x:{state.uid}:{state.uid}:slurmlab's ordinary user:{state.home}:/bin/bash\n"
    (folder / "passwd").write_text(Path("/etc/passwd").read_text() + user)
    (folder / "group").write_text(Path("/etc/group").read_text() + f"{USER}:x:{state.uid}:\n")
    (folder / "slurm.conf").write_text("\n".join([*_settings(state), *_nodes(state), *_partitions(state)]) + "\n")
    devices = f"{folder}/dev/nvidia[0-{GPUS - 1}]"
    (folder / "gres.conf").write_text("".join(f"NodeName={n} Name=gpu File={devices}\n" for n in state.gpu_names))
    (folder / "cgroup.conf").write_text("")
    database = folder / "slurmdbd.conf"
    database.touch(mode=0o600)
    database.write_text("\n".join(_slurmdbd(state)) + "\n")


def _settings(state: State) -> list[str]:
    folder = state.folder
    controller = state.address(CONTROLLER)
    accounting = {
        "AccountingStorageType": "accounting_storage/slurmdbd",
        "AccountingStorageHost": controller,
        "AccountingStoragePass": f"{folder}/munge.socket",
        "AccountingStorageTRES": "gres/gpu",
        "AccountingStorageEnforce": "associations",
        "JobAcctGatherType": "jobacct_gather/linux",
        "JobAcctGatherFrequency": "10",
    }
    settings = {
        "ClusterName": CLUSTER,
        "SlurmUser": "root",
        "SlurmctldHost": f"{CONTROLLER}({controller})",
        "AuthType": "auth/munge",
        # A requeued job waits until credentials of its last start have expired: 121 s by default.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": f"{folder}/ctld",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "SlurmctldDebug": "verbose",
        "SlurmdDebug": "verbose",
        "LogTimeFormat": "iso8601_ms",
        "ProctrackType": "proctrack/cgroup" if tracks_by_cgroup() else "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "MpiDefault": "none",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": "2",
        "PropagateResourceLimits": "NONE",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "DefMemPerCPU": "1000",
        "GresTypes": "gpu",
        "SchedulerType": "sched/backfill",
        "PriorityType": "priority/basic",
        "SchedulerParameters": "bf_interval=1,bf_hetjob_immediate,sched_interval=1,sched_min_interval=0,"
        "batch_sched_delay=0",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "JobRequeue": "1",
        "KillWait": "5",
        "SlurmdTimeout": "10",
        "SlurmctldTimeout": "30",
        "MessageTimeout": "5",
        "TCPTimeout": "2",
        "InactiveLimit": "0",
        "MinJobAge": "300",
        "CompleteWait": "0",
        # Two clusters share the cgroups of this machine, so their job ids must differ.
        "FirstJobId": str((state.net - 1) * 100000 + 1),
    }
    settings |= (accounting if state.accounting else {}) | state.slurm
    return [f"{key}={value}" for key, value in settings.items()]


def _nodes(state: State) -> list[str]:
    return [
        f"NodeName={name} NodeAddr={state.address(name)} CPUs={CPUS} RealMemory={MEMORY_MB} State=UNKNOWN"
        + (f" Gres=gpu:{GPUS}" if name in state.gpu_names else "")
        for name in state.names
    ]


def _partitions(state: State) -> list[str]:
    every, gpu = ",".join(state.names), ",".join(state.gpu_names)
    low, warned = "PriorityTier=1", f"GraceTime={state.grace_s}"
    rows = [
        ("cpu", every, f"Default=YES {low} PreemptMode=OFF MaxTime=1-0 DefaultTime=10"),
        ("gpu", gpu, f"{low} PreemptMode=OFF MaxTime=1-0 DefaultTime=10"),
        ("preempt", every, f"{low} PreemptMode=REQUEUE {warned} MaxTime=60 DefaultTime=10"),
        ("sudden", every, f"{low} PreemptMode=REQUEUE GraceTime=0 MaxTime=60 DefaultTime=10"),
        ("cancelled", every, f"{low} PreemptMode=CANCEL {warned} MaxTime=60 DefaultTime=10"),
        ("short", every, f"{low} PreemptMode=OFF MaxTime=2 DefaultTime=1"),
        ("high", every, "PriorityTier=10 PreemptMode=OFF MaxTime=1-0 DefaultTime=10"),
    ]
    return [f"PartitionName={name} Nodes={nodes} State=UP {more}" for name, nodes, more in rows]


def _slurmdbd(state: State) -> list[str]:
    folder = state.folder
    return [
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        f"DbdHost={CONTROLLER}",
        f"DbdAddr={state.address(CONTROLLER)}",
        "SlurmUser=root",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        "StorageUser=slurm",
        "StorageLoc=slurm_acct_db",
        f"LogFile={folder}/log/slurmdbd.log",
        f"PidFile={folder}/run/slurmdbd.pid",
    ]
