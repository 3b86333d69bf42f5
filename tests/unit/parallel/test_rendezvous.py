"""The port of a rendezvous stays with rank 0 from the moment it is chosen, and ranks meet there in any order."""

from __future__ import annotations

import errno
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ltx_ray.engine.base import open_store
from ltx_ray.parallel.rendezvous import Rendezvous, listen


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_no_other_process_can_take_the_port(address):
    family = socket.AF_INET6 if address == "::1" else socket.AF_INET
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError:
        pytest.skip(f"this machine has no {address}")
    with listen(address) as listener, socket.socket(family) as other:
        port = listener.getsockname()[1]
        with pytest.raises(OSError) as refused:
            other.bind((address, port))
        assert refused.value.errno == errno.EADDRINUSE
        socket.create_connection((address, port)).close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["rank 0 first", "rank 0 last"])
def test_ranks_meet_at_the_port(order):
    world = len(order)
    listener = listen("127.0.0.1")
    port = listener.getsockname()[1]
    stores = []

    def join(rank: int) -> list[bytes]:
        store = open_store(Rendezvous("127.0.0.1", port, None if rank else listener), world, 60.0)
        # Once rank 0's is gone, the others can ask no more.
        stores.append(store)
        store.set(f"rank {rank}", str(rank))
        return [store.get(f"rank {other}") for other in range(world)]

    with ThreadPoolExecutor(world) as ranks:
        found = [ranks.submit(join, rank) for rank in order]
        assert [f.result() for f in found] == [[b"0", b"1", b"2"]] * world
    assert listener.fileno() == -1, "the store has taken the socket over"


def test_a_rank_that_never_comes_is_not_waited_for_longer_than_the_timeout():
    from torch.distributed import DistError

    listener = listen("127.0.0.1")
    with pytest.raises((DistError, RuntimeError), match=r"(?i)time"):
        open_store(Rendezvous("127.0.0.1", listener.getsockname()[1], listener), 2, 1.0)
