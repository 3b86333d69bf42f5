"""A gang's calls: what an error of Ray says of the ranks and of the call's inputs."""

from __future__ import annotations

import pytest

ray = pytest.importorskip("ray")

from ltx_ray.pools import gang as gangs
from ltx_ray.pools.gang import Call, Gang, GangLost, GangState, InputsMissing
from ltx_ray.pools.protocol import RankInfo
from ltx_ray.stages import Stage


def gang_in_a_call() -> Gang:
    gang = object.__new__(Gang)
    gang.state, gang.ranks = GangState.READY, [RankInfo(0, address="1.2.3.4", device="cpu")]
    gang.calls = [Call(Stage.STAGE2, None, [], reports=["report"], started=0.0)]  # type: ignore[arg-type, list-item]
    return gang


@pytest.mark.parametrize(
    "error, lost, node_lost",
    [
        (ray.exceptions.OutOfMemoryError("the memory monitor killed this worker"), True, False),
        (ray.exceptions.WorkerCrashedError(), True, False),
        (ray.exceptions.ActorDiedError(), True, False),
        (ray.exceptions.RayActorError(error_msg="The actor is dead because its node has died."), True, True),
        (ray.exceptions.ObjectLostError("a" * 40, "address", "call site"), False, False),
    ],
    ids=["out of memory", "crashed", "died", "node lost", "inputs lost"],
)
def test_a_dead_rank_is_told_from_lost_inputs(monkeypatch, error, lost, node_lost):
    def get(ref):
        raise error

    monkeypatch.setattr(gangs.ray, "get", get)
    with pytest.raises(GangLost if lost else InputsMissing) as caught:
        gang = gang_in_a_call()
        gang.collect(gang.calls[0], {"report"})  # type: ignore[arg-type]
    assert getattr(caught.value, "node_lost", False) == node_lost
