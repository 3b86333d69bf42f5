"""The nodes whose NVIDIA driver is another one than that of the others. They are named, and serve all the same.

A driver seldom changes bits: kernels come compiled with the packages, or Triton compiles them. Where one does change
what a node computes, the node's answer shows that (driver/admission.py).
"""

from __future__ import annotations

from ltx_ray.driver.ballot import Ballot
from ltx_ray.driver.events import EventLog
from ltx_ray.driver.progress import Progress


class GpuDrivers:
    """Compares the driver of each node with that of most nodes, or with the first one as long as most have none."""

    def __init__(self, events: EventLog, progress: Progress):
        self._events, self._progress = events, progress
        self._ballot = Ballot()
        #: Names of the nodes in messages, and the nodes that have been named.
        self._where: dict[str, str] = {}
        self._named: set[str] = set()

    def seen(self, node: str, where: str, version: str) -> None:
        """The node that messages call `where` has this driver; "" for none. Cheap for a node that is known."""
        if not version or self._ballot.votes.get(node) == version:
            return
        self._ballot.cast(node, version)
        self._where[node] = where
        usual = self._ballot.settled or next(iter(self._ballot.votes.values()))
        for odd, driver in self._ballot.votes.items():
            if driver != usual and odd not in self._named:
                self._name(odd, driver, usual)

    def _name(self, node: str, version: str, usual: str) -> None:
        self._named.add(node)
        where = self._where[node]
        self._progress.say(f"{where}: its NVIDIA driver is {version}, and that of the other nodes {usual}")
        self._events.emit("driver_differs", node=node, where=where, driver=version, usual=usual)
