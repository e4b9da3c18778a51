"""A sequence over a 2-D mesh: nodes, with a network between them, and the ranks of each node.

Rank `node * each + number` of the whole group is that number of its node: the mesh is read row by row, as shards are.
Example: `init_device_mesh("cuda", (4, 8), mesh_dim_names=("node", "gpu"))`; rank 11 is number 3 of node 1.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import OptionError
from .exchange.store import meeting_point, share


@dataclass(frozen=True)
class Nodes:
    """The process groups of a 2-D mesh that a rank is in."""

    whole: dist.ProcessGroup  # all ranks of the mesh
    outer: dist.ProcessGroup  # those of this rank's number, one of each node
    inner: dist.ProcessGroup  # those of this rank's node
    hosts: tuple[str, ...]  # of every rank

    @property
    def count(self) -> int:
        return self.outer.size()

    @property
    def each(self) -> int:
        """Ranks of a node."""
        return self.inner.size()

    def explain(self) -> str:
        """One line per node: its ranks and where they are."""
        return "\n".join(map(self._line, range(self.count)))

    def _line(self, node: int) -> str:
        first, last = node * self.each, (node + 1) * self.each - 1
        hosts = sorted(set(self.hosts[first : last + 1]))
        where = f"on {hosts[0]}" if len(hosts) == 1 else f"on {len(hosts)} hosts, not one: {', '.join(hosts)}"
        return f"node {node}: ranks {first}..{last}, {where}"


def nodes_of(mesh: DeviceMesh, timeout: timedelta) -> Nodes:
    """The nodes of a mesh (outer = nodes, inner = ranks of a node); every rank of the mesh that it is part of does it.

    Raises OptionError for a mesh without names, or whose ranks do not rise row by row.
    """
    if mesh.ndim != 2 or mesh.mesh_dim_names is None:
        raise OptionError(
            f"group is a DeviceMesh of {mesh.ndim} dimensions {mesh.mesh_dim_names}; a sequence goes over one, or over "
            'two that have names: nodes and the ranks of a node, e.g. mesh["node", "gpu"]'
        )
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise OptionError(
            f"group is a DeviceMesh of the ranks {mesh.mesh.tolist()}; a sequence over nodes needs them to rise row by "
            "row, as process groups number theirs"
        )
    whole = mesh._flatten().get_group()
    hosts = share(meeting_point(whole), "host", whole, platform.node(), timeout)
    return Nodes(whole, mesh.get_group(0), mesh.get_group(1), tuple(hosts))
