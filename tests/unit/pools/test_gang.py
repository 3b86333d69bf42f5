"""A gang's calls: what an error of Ray says of the ranks and of the call's inputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

ray = pytest.importorskip("ray")

from ltx_ray.config import EngineSpec, ModelFiles, Numerics, PoolSpec
from ltx_ray.pools import gang as gangs
from ltx_ray.pools.gang import Call, Gang, GangLost, GangState, InputsMissing
from ltx_ray.pools.protocol import LossCause, RankInfo, ReplicaLost, loss_cause
from ltx_ray.records import CallError, CallReport, ErrorKind
from ltx_ray.stages import Stage
from ltx_ray.storage.requests import REQUESTS


def gang_in_a_call() -> Gang:
    gang = object.__new__(Gang)
    gang.state, gang.ranks = GangState.READY, [RankInfo(0, address="1.2.3.4", device="cpu")]
    gang._pings = []
    gang.calls = [Call(Stage.STAGE2, None, [], reports=["report"], started=0.0)]  # type: ignore[arg-type, list-item]
    return gang


@pytest.mark.parametrize(
    "error, lost, node_lost, cause",
    [
        (ray.exceptions.OutOfMemoryError("the memory monitor killed this worker"), True, False, "oom"),
        (ray.exceptions.WorkerCrashedError(), True, False, "rank"),
        (ray.exceptions.ActorDiedError(), True, False, "rank"),
        (ray.exceptions.RayActorError(error_msg="The actor is dead because its node has died."), True, True, "rank"),
        (ray.exceptions.ObjectLostError("a" * 40, "address", "call site"), False, False, None),
    ],
    ids=["out of memory", "crashed", "died", "node lost", "inputs lost"],
)
def test_a_dead_rank_is_told_from_lost_inputs(monkeypatch, error, lost, node_lost, cause):
    def get(ref):
        raise error

    monkeypatch.setattr(gangs.ray, "get", get)
    with pytest.raises(GangLost if lost else InputsMissing) as caught:
        gang = gang_in_a_call()
        gang.collect(gang.calls[0], {"report"})  # type: ignore[arg-type]
    assert getattr(caught.value, "node_lost", False) == node_lost
    assert getattr(caught.value, "cause", None) == cause


def test_a_call_or_a_ping_without_an_answer_is_a_timeout():
    gang = gang_in_a_call()
    gang.calls[0].started, gang.calls[0].timeout = 100.0, 5.0
    assert gang.overdue(104.0, 1.0) is None
    assert gang.overdue(106.0, 1.0).cause == LossCause.TIMEOUT
    gang.calls, gang._pings, gang._pinged = [], ["ping"], 100.0
    assert gang.overdue(159.0, 1.0) is None
    assert (lost := gang.overdue(161.0, 1.0)).cause == LossCause.TIMEOUT and lost.idle


@pytest.mark.parametrize(
    "lost, cause",
    [
        (ReplicaLost("a", "", served=True), "rank"),
        (ReplicaLost("a", "", served=True, ended_by=LossCause.OOM), "oom"),
        (ReplicaLost("a", "", served=False, ended_by=LossCause.OOM), "start"),
        (ReplicaLost("a", "", served=False, node_lost=True), "node"),
        (ReplicaLost("a", "", served=True, inputs_lost=True), "node"),
    ],
)
def test_what_has_ended_a_replica(lost, cause):
    assert lost.cause == cause


def test_a_lack_of_memory_is_told_from_other_errors():
    kinds = [CallError(ErrorKind.PROCESS, name, "") for name in ("OutOfMemoryError", "DistBackendError")]
    assert [loss_cause(error) for error in kinds] == ["oom", "rank"]


def test_requests_of_the_ranks_are_counted_when_their_reports_arrive(monkeypatch):
    reports = [CallReport(1.0, 0.0, requests=(("writing", "ok", number),)) for number in (1, 2, 4)]
    monkeypatch.setattr(gangs.ray, "get", lambda ref: reports[ref])
    gang = gang_in_a_call()
    call = gang.calls[0] = Call(Stage.STAGE2, None, [], 0.0, reports=[0, 1])  # type: ignore[arg-type, list-item]
    REQUESTS.take()
    assert gang.collect(call, {1}) is None  # type: ignore[arg-type]
    assert REQUESTS.take() == (("writing", "ok", 2),)
    assert gang.collect(call, {0}) is not None  # type: ignore[arg-type]
    gang._loaded(0, reports[2])
    assert REQUESTS.take() == (("writing", "ok", 5),)


class FakeActors:
    """In the place of `ray.remote`: counts the actors, and what each was asked for with."""

    def __init__(self):
        self.asked: list[dict] = []

    def __call__(self, kind):
        return self

    def options(self, **options):
        self.asked.append(options)
        return self

    def remote(self, hides_gpus=False):
        self.asked[-1]["hides_gpus"] = hides_gpus
        return SimpleNamespace(
            **{name: SimpleNamespace(remote=lambda name=name: name) for name in ("describe", "listen")}
        )


@pytest.mark.parametrize(
    "ranks, gpus, groups, actors",
    [(1, 0.0, 0, 1), (1, 0.6, 1, 1), (2, 1.0, 1, 0)],
    ids=["a rank without a GPU", "a rank with a GPU", "a gang"],
)
def test_what_a_replica_asks_for(monkeypatch, ranks, gpus, groups, actors):
    asked: list[list[dict]] = []

    def group(bundles, **how):
        asked.append(bundles)
        return SimpleNamespace(ready=lambda: "group")

    fake = FakeActors()
    monkeypatch.setattr(gangs, "placement_group", group)
    monkeypatch.setattr(gangs, "PlacementGroupSchedulingStrategy", lambda group, rank: ("in the group", rank))
    monkeypatch.setattr(gangs.ray, "remote", fake)
    engine = EngineSpec("m:E", ModelFiles("c", "g", "u"), Numerics(), "out")
    gang = Gang("a", PoolSpec("a", (Stage.TEXT,), 1, ranks, engine, cpus_per_rank=3, gpus_per_rank=gpus), ["bad"])
    assert gang.state is GangState.PLACING
    assert len(asked) == groups and len(fake.asked) == actors
    if groups:
        assert asked[0] == [{"CPU": 3, "GPU": gpus}] * ranks
    # Nothing but the answers of ranks is waited for, unless a group comes first.
    assert gang.waits_for() == (["describe"] if actors else ["group"])
    for options in fake.asked:
        assert (options["num_cpus"], options["num_gpus"], options["hides_gpus"]) == (3, gpus, not gpus)
        avoids = {"ray.io/node-id": "!in(bad)"}
        assert options.get("scheduling_strategy") == (("in the group", 0) if groups else None)
        assert options.get("label_selector") == (None if groups else avoids)
