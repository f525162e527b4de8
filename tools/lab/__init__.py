"""slurmlab: a real Slurm cluster on one machine, for tests and for trying things out.

The controller and every node are each a process in separate namespaces: network (own address, own ports, a connection
that can be cut), PID (killing its first process is a power loss: everything on the node dies at once), UTS (`hostname`
says node3) and mount (own /etc/hosts, /etc/passwd, /proc, /sys, /dev/shm). All other files are this machine's, so every
directory acts as the cluster's shared file system. A bridge in another namespace connects them. The machine itself is
the login node. Namespaces exist as long as their process, so a cluster whose processes are gone leaves only files.

Real are slurmctld, slurmd, slurmdbd with MariaDB, munge, scheduling, preemption, time limits, signals, node failures,
accounting with enforced associations, and an ordinary user, who exists only inside the cluster. Simulated are the
nodes' CPUs, memory and GPUs (Slurm counts them, nothing enforces them). Shorter than at a real site are KillWait,
SlurmdTimeout, the delay before a requeued job may start, and the scheduler's intervals; `conf` changes them.

Needs root, Linux, and the Debian packages that `tools/install.sh` names. No systemd, no containers, no fixed ports.
"""

from tools.lab.errors import LabError
from tools.lab.lab import Lab

__all__ = ["Lab", "LabError"]
