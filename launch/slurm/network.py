"""Which network interfaces the nodes of a job are told to talk over, held against those of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from launch.slurm.cluster import ClusterConfig

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def interfaces(cluster: ClusterConfig) -> Iterator[tuple[bool, str, str]]:
    """(whether it is well, what was found, what to do) of each library that the job will use.

    Agreements, saving and loading go by gloo on GPUs too: it hangs where a host's name leads to 127.0.1.1.
    """
    here = [interface for _, interface in socket.if_nameindex()]
    for name in [GLOO, *([NCCL] if cluster.gpus_per_node else [])]:
        given = {**os.environ, **cluster.environment}.get(name)
        if given is None:
            advice = f"set it in the cluster's environment; here are {', '.join(here)}"
            yield False, f"{name} isn't set: {cluster.nodes} nodes choose alone", advice
        elif not any(matches(name, given, interface) for interface in here):
            found = f"{name}={given} isn't on this machine, which has {', '.join(here)}"
            yield False, found, "make sure that the nodes have it"
        else:
            yield True, f"{name}={given}", ""


def matches(name: str, given: str, interface: str) -> bool:
    """NCCL reads "=eth0" as that one and "eth" as all that begin so, "^docker0" as all but that; gloo whole
    names; both several by commas.
    """
    if name == GLOO:
        return interface in given.split(",")
    if given.startswith("^"):
        return True
    exact = given.startswith("=")
    names = given.removeprefix("=").split(",")
    return any(interface == name if exact else interface.startswith(name) for name in names if name)
