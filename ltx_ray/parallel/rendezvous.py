"""Where the ranks of a gang meet: a port that rank 0 listens on from the moment it is chosen."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Rendezvous:
    """A port on the node of rank 0. `listener` is the socket that listens there: rank 0 has it, the others None."""

    host: str
    port: int
    listener: socket.socket | None = None


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port of this node, on every address of the family of `address`.

    A port that is chosen and let go may be taken by another process before the ranks meet, so the socket stays open
    until the store of the rendezvous takes it over.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=socket.SOMAXCONN)
