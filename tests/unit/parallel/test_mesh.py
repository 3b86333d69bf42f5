"""Which ranks of a gang are in which group."""

from __future__ import annotations

import pytest

from ltx_ray.parallel import mesh
from ltx_ray.parallel.collectives import SINGLE_RANK
from ltx_ray.parallel.mesh import make_mesh


@pytest.fixture
def groups(monkeypatch) -> dict[int, list[tuple[int, ...]]]:
    """The groups that each rank asks torch.distributed for, in order."""
    asked: dict[int, list[tuple[int, ...]]] = {}

    def new_group(ranks: list[int]) -> tuple[int, ...]:
        asked.setdefault(new_group.rank, []).append(tuple(ranks))
        return tuple(ranks)

    monkeypatch.setattr(mesh.dist, "new_group", new_group)
    asked["by"] = new_group
    return asked


@pytest.mark.parametrize(
    ("world", "tp", "passes", "tokens"),
    [(1, 1, 1, 1), (4, 4, 1, 1), (4, 1, 4, 1), (4, 1, 1, 4), (4, 2, 1, 1), (8, 2, 2, 2), (12, 2, 3, 2), (6, 1, 2, 3)],
)
def test_every_rank_is_in_the_groups_of_its_place(groups, world, tp, passes, tokens):
    of = {}
    for rank in range(world):
        groups["by"].rank = rank
        of[rank] = make_mesh(rank, world, tp, passes, tokens)
    for rank, found in of.items():
        tp_rank, peer = rank % tp, rank // tp
        pass_rank, token_rank = (peer // tokens, peer % tokens) if passes * tokens > 1 else (0, 0)
        expected = {
            "tp": [r for r in range(world) if r // tp == peer],
            "peers": [r for r in range(world) if r % tp == tp_rank],
            "passes": [tp_rank + tp * (token_rank + tokens * n) for n in range(passes)],
            "tokens": [tp_rank + tp * (n + tokens * pass_rank) for n in range(tokens)],
        }
        for name, ranks in expected.items():
            group = getattr(found, name)
            if len(ranks) == 1:
                assert group == SINGLE_RANK, name
                continue
            assert (group.size, group.rank) == (len(ranks), ranks.index(rank)), (name, rank)
            # The default group is that of all ranks.
            assert group.transport.group == (None if len(ranks) == world else tuple(ranks)), (name, rank)
    asked = [groups.get(rank, []) for rank in range(world)]
    assert all(one == asked[0] for one in asked), "every rank makes every group, in one order"
