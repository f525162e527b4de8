"""slurmlab: a real Slurm cluster on one machine, for tests and for trying things out.

The controller and every node are a process in namespaces of its own: network (own address, own ports, a cable that can
be pulled), PID (killing its first process is pulling the plug: everything on the node dies at once), UTS (`hostname`
says node3) and mount (own /etc/hosts, /etc/passwd, /proc, /sys, /dev/shm). All other files are this machine's, so every
directory acts as the cluster's shared file system. A bridge in one more namespace joins them. The machine itself is the
login node. Namespaces live as long as their process, so a cluster whose processes are gone has left nothing but files.

Real: slurmctld, slurmd, slurmdbd with MariaDB, munge, scheduling, preemption, time limits, signals, node failures,
accounting with enforced associations, and an ordinary user, who exists inside the cluster only. Pretended: the nodes'
CPUs, memory and GPUs (Slurm counts them, nothing enforces them). Shorter than at a real site: KillWait, SlurmdTimeout,
the delay before a requeued job may start, the scheduler's intervals; `conf` changes them.

Needs root, Linux, and the Debian packages that `tools/install.sh` names. No systemd, no containers, no fixed ports.
"""

from tools.lab.errors import LabError
from tools.lab.lab import Lab

__all__ = ["Lab", "LabError"]
