"""Which replicas may join a run, by what they show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_ray.driver.admission import Admission, Claims
from ltx_ray.pools.pool import StartFailed
from ltx_ray.pools.protocol import RankInfo, ReplicaStarted
from ltx_ray.records import Evidence
from tests.support.fake_cluster import SPEC, StaffedRun

GOOD = Evidence({"checkpoint_path": "c0"}, {"torch": "2.11"}, "580", "NVIDIA H100", {"transformer": "right"})
CLAIMS = Claims({"checkpoint_path": "c0", "gemma_root": "g0"})


class Kept(dict):
    """Answers of earlier runs."""

    def keep(self, key, value):
        self[key] = value


class Judged:
    """A run of five replicas of stage 1 on nodes with a GPU each, and its admission."""

    def __init__(
        self,
        nodes: int = 5,
        claims: Claims = CLAIMS,
        answers: Kept | None = None,
        one_each: bool = False,
        decode: int = 1,
    ):
        self.run = StaffedRun(stage1=5, decode=decode)
        self.run.replicas.cards = {f"n{number}": 1 for number in range(nodes)}
        self.versions: list = []
        self.answers = Kept() if answers is None else answers
        self.admission = Admission(self.run.staff, claims, self.answers, self.versions.append)
        self.run.turn(one_each=one_each)

    def up(self, number: int, node: str, now: float = 0.0, pool: str = "stage1", **changes) -> list[str]:
        """A replica is up; those that may join now."""
        name = f"{pool}-{number}"
        self.run.replicas.waits.pop(name)
        event = ReplicaStarted(
            name, [RankInfo(0, node=node, address=node, gpus="0")], 1.0, replace(GOOD, **changes)
        )  # fmt: skip
        return self.join(self.admission.take(event, now))

    def join(self, events) -> list[str]:
        for event in events:
            pool = self.run.staff.started(event)
            self.run.policy.add_replica(event.replica, pool.spec.roles, 1, event.ranks[0].node)
        return [event.replica for event in events]

    @property
    def refused(self) -> dict[str, str]:
        return {event["replica"]: event["reason"] for event in self.run.told("gang_refused")}


def answers_of_a_run() -> Kept:
    """What a run whose replicas agreed has kept."""
    judged = Judged(nodes=1)
    judged.up(0, "n0")
    return Kept(judged.answers)


def test_replicas_that_agree_join_and_the_rows_get_their_versions():
    judged = Judged()
    assert judged.up(0, "n0") == [], "another node may say otherwise"
    assert judged.up(1, "n1") == ["stage1-0", "stage1-1"] and judged.up(2, "n2") == ["stage1-2"]
    assert judged.versions == [{"torch": "2.11"}] and not judged.refused
    assert list(judged.answers.values()) == ["right"]


def test_a_replica_with_another_file_is_refused_and_its_node_excluded():
    judged = Judged()
    assert judged.up(0, "n0", files={"checkpoint_path": "c1"}) == []
    assert judged.refused == {"stage1-0": "its file checkpoint_path has the digest c1, and that of the rows is c0"}
    assert judged.run.replicas.avoided == {"n0"} and judged.run.replicas.killed == ["stage1-0"]
    assert judged.up(1, "n1") == [] and judged.up(2, "n2") == ["stage1-1", "stage1-2"]


@pytest.mark.parametrize(
    ("driver", "nodes", "fits"),
    [
        ("0.1.0", "0.1.0", True),
        ("0.1.0", "0.2.0", False),
        ("0.1.0+1a2b3c4d5e6f", "0.1.0+1a2b3c4d5e6f", True),
        ("0.1.0+1a2b3c4d5e6f", "0.1.0+6f5e4d3c2b1a", False),
        ("0.1.0", "0.1.0+6f5e4d3c2b1a", True),
    ],
)
def test_replicas_have_the_drivers_version(driver, nodes, fits):
    """Though all nodes have the same, and none is odd. A commit counts where both know theirs."""
    judged = Judged(claims=replace(CLAIMS, version=driver))
    judged.up(0, "n0", versions={"ltx_ray": nodes})
    joined = judged.up(1, "n1", versions={"ltx_ray": nodes})
    assert joined == (["stage1-0", "stage1-1"] if fits else [])
    reason = f"its ltx-ray is {nodes}, and the driver's is {driver}"
    assert judged.refused == ({} if fits else {"stage1-0": reason, "stage1-1": reason})


def test_of_two_that_differ_a_third_tells_which_is_odd_and_that_may_be_the_first():
    judged = Judged()
    assert judged.up(0, "n0", answers={"transformer": "wrong"}) == []
    assert judged.up(1, "n1") == [], "nobody knows yet which of them is right"
    assert judged.run.turn() == ["stage1-5", "stage1-6"], "two more are started, in the places of those that wait"
    assert judged.up(2, "n2") == ["stage1-1", "stage1-2"]
    assert judged.run.replicas.killed[0] == "stage1-0" and judged.run.replicas.avoided == {"n0"}
    assert "it computes wrong for the known-answer clip, and the other nodes right" in judged.refused["stage1-0"]
    assert list(judged.answers.values()) == ["right"]


def test_a_decoder_whose_answer_is_odd_is_refused_like_a_rank_of_the_dit():
    judged = Judged(decode=3)
    assert judged.up(0, "n0", pool="decode", answers={"decoder": "wrong"}) == ["decode-0"], "no other one is starting"
    judged.run.replicas.waits = dict.fromkeys(judged.run.replicas.waits, 100.0)
    judged.run.turn()
    judged.up(1, "n1", pool="decode", answers={"decoder": "right"})
    assert judged.up(2, "n2", pool="decode", answers={"decoder": "right"}) == ["decode-1", "decode-2"]
    assert judged.run.replicas.avoided == {"n0"} and "decode-0" in judged.run.replicas.killed
    assert any("to be doubted; the calls in the events name decode-0" in said for said in judged.run.said)


def test_one_that_served_because_nobody_was_starting_may_be_outvoted_later():
    judged = Judged()
    judged.run.replicas.waits = dict.fromkeys(judged.run.replicas.waits, 60.0)
    assert judged.up(0, "n0", answers={"transformer": "wrong"}) == ["stage1-0"]
    assert judged.up(1, "n1") == [] and judged.up(2, "n2") == ["stage1-1", "stage1-2"]
    assert judged.run.replicas.killed == ["stage1-0"] and judged.run.replicas.avoided == {"n0"}
    assert any("stage1_replica and stage2_replica of the index name stage1-0" in said for said in judged.run.said)


def test_the_replicas_that_made_the_preflight_clip_make_no_row_until_another_node_has_said_the_same():
    judged = Judged(one_each=True)
    assert judged.up(0, "n0", answers={"transformer": "wrong"}) == ["stage1-0"], "no other one is starting"
    judged.run.turn()
    judged.admission.rows_begin(0.0)
    assert not judged.run.policy.has_replica("stage1-0") and judged.admission.settle(1.0) == []
    judged.admission.rows_begin(2.0)
    assert judged.up(1, "n1") == [] and judged.up(2, "n2") == ["stage1-1", "stage1-2"]
    assert list(judged.refused) == ["stage1-0"] and len(judged.run.told("gang_started")) == 3


def test_a_replica_that_made_the_preflight_clip_goes_on_once_it_is_confirmed_and_is_told_of_once():
    judged = Judged(one_each=True)
    judged.up(0, "n0")
    judged.run.turn()
    judged.admission.rows_begin(0.0)
    assert judged.up(1, "n0") == [], "its own node does not count"
    assert judged.up(2, "n2") == ["stage1-0", "stage1-1", "stage1-2"]
    assert all(judged.run.policy.has_replica(f"stage1-{number}") for number in range(3))
    assert [event["replica"] for event in judged.run.told("gang_started")] == ["stage1-0", "stage1-1", "stage1-2"]


def test_one_whose_pool_is_not_whole_waits_once_rows_have_begun():
    """Decoders beyond the first are asked for after the DiT's replicas."""
    judged = Judged(one_each=True)
    judged.up(0, "n0")
    judged.admission.rows_begin(0.0)
    assert not judged.run.policy.has_replica("stage1-0"), "four more are to be started"
    judged.run.turn()
    assert judged.up(1, "n1") == ["stage1-0", "stage1-1"]


def test_one_that_waits_on_a_node_that_is_found_wrong_does_not_join():
    judged = Judged()
    judged.up(0, "n0")
    judged.run.staff.exclude([RankInfo(0, node="n0", address="n0", gpus="1")], "it computes wrongly", 0.0)
    assert judged.up(1, "n1") == ["stage1-1"] and not judged.run.staff.knows("stage1-0")


def test_who_is_alone_waits_for_nobody():
    one_node = Judged(nodes=1)
    assert one_node.up(0, "n0") == ["stage1-0"], "no other node has GPUs"
    judged = Judged()
    judged.up(0, "n0")
    for name in list(judged.run.replicas.waits):
        judged.run.replicas.waits.pop(name)
        judged.run.staff.give_back(name, "its node drains")
    assert judged.join(judged.admission.settle(1.0)) == ["stage1-0"], "no other one is starting any more"
    slow = Judged()
    slow.up(0, "n0")
    assert slow.admission.settle(299.0) == [] and slow.join(slow.admission.settle(301.0)) == ["stage1-0"]


def test_a_replica_that_is_held_back_is_up_and_leaves_with_its_node():
    judged = Judged()
    judged.up(0, "n0")
    assert judged.run.staff.pool_of("stage1-0").ready == 1
    judged.run.replicas.left = ["stage1-0"]
    judged.run.turn()
    assert not judged.run.staff.knows("stage1-0") and judged.run.told("gang_given_back")
    assert judged.up(1, "n1") == ["stage1-1"], "what the first has said counts"


def test_the_second_may_be_the_odd_one():
    judged = Judged()
    judged.up(0, "n0")
    assert judged.up(1, "n1", answers={"transformer": "wrong"}) == []
    assert judged.up(2, "n2") == ["stage1-0", "stage1-2"]
    assert list(judged.refused) == ["stage1-1"] and judged.run.replicas.avoided == {"n1"}


def test_a_node_with_other_versions_is_the_odd_one():
    judged = Judged()
    judged.up(0, "n0")
    judged.up(1, "n1", versions={"torch": "2.12"})
    judged.up(2, "n2")
    assert judged.refused == {
        "stage1-1": 'its package versions are {"torch":"2.12"}, and those of the other nodes {"torch":"2.11"}'
    }
    assert judged.versions == [{"torch": "2.11"}]


def test_a_node_whose_kernels_are_of_another_package_is_the_odd_one():
    judged = Judged(decode=3)
    kernels = {"triton": "3.6", "fa3-fwd": "0.0.3"}
    judged.up(0, "n0", kernels=kernels)
    judged.up(1, "n1", kernels={**kernels, "fa3-fwd": "0.0.4"}, answers={"transformer": "alike at few tokens"})
    judged.up(2, "n2", kernels=kernels)
    assert list(judged.refused) == ["stage1-1"] and '"fa3-fwd":"0.0.4"' in judged.refused["stage1-1"]
    judged.run.replicas.waits = dict.fromkeys(judged.run.replicas.waits, 100.0)
    judged.run.turn()
    judged.run.staff.pool_of("decode-0").spec = replace(
        judged.run.staff.pool_of("decode-0").spec, engine=replace(SPEC, engine="m:Decode")
    )
    assert judged.up(0, "n3", pool="decode", kernels={"triton": "3.6"}, answers={}) == ["decode-0"]
    assert judged.versions == [{"torch": "2.11", **kernels}], "a decoder has no attention"


def test_a_node_with_another_driver_of_its_gpus_is_named_and_serves():
    judged = Judged()
    assert judged.up(0, "n0") == [] and judged.up(1, "n1", driver="550") == ["stage1-0", "stage1-1"]
    assert [event["where"] for event in judged.run.told("driver_differs")] == ["node n1"] and not judged.refused


def test_without_a_third_node_those_that_serve_go_on():
    judged = Judged(nodes=2)
    judged.up(0, "n0")
    assert judged.up(1, "n1", answers={"transformer": "other"}) == ["stage1-0"]
    assert list(judged.refused) == ["stage1-1"]


def test_nobody_waits_for_ever_for_a_third():
    judged = Judged()
    judged.up(0, "n0")
    judged.up(1, "n1", answers={"transformer": "other"}, now=10.0)
    assert judged.admission.settle(299.0) == [] and not judged.refused
    assert judged.join(judged.admission.settle(300.0)) == ["stage1-0"] and list(judged.refused) == ["stage1-1"]


def test_an_answer_of_earlier_runs_is_a_vote():
    judged = Judged(answers=answers_of_a_run())
    assert judged.up(0, "n0", answers={"transformer": "wrong"}) == []
    assert judged.up(1, "n1") == ["stage1-1"] and list(judged.refused) == ["stage1-0"]
    judged = Judged(answers=answers_of_a_run())
    assert judged.up(0, "n0") == ["stage1-0"], "it is confirmed"


def test_all_nodes_may_outvote_earlier_runs():
    judged = Judged(answers=answers_of_a_run())
    judged.up(0, "n0", answers={"transformer": "new"})
    assert judged.up(1, "n1", answers={"transformer": "new"}) == ["stage1-0", "stage1-1"]
    assert any("compute otherwise than the runs before" in said for said in judged.run.said)
    assert list(judged.answers.values()) == ["new"]


def test_a_run_of_one_node_says_that_it_computes_otherwise_and_goes_on():
    judged = Judged(nodes=1, answers=answers_of_a_run())
    assert judged.up(0, "n0", answers={"transformer": "new"}) == ["stage1-0"]
    assert any("no other node can settle which is right" in said for said in judged.run.said)


def test_gpus_of_another_model_are_left_out_unless_the_noise_is_drawn_on_a_cpu():
    judged = Judged()
    assert judged.up(0, "n0") == [] and judged.up(1, "n1", device="NVIDIA A100") == []
    assert judged.refused == {
        "stage1-1": "its GPU is a NVIDIA A100, and those of this run are NVIDIA H100; --noise-device cpu allows both"
    }
    judged = Judged(claims=replace(CLAIMS, one_model=False))
    assert judged.up(0, "n0") == []
    assert judged.up(1, "n1", device="NVIDIA A100", answers={"transformer": "as an A100 rounds"}) == []
    assert judged.up(2, "n2") == ["stage1-0", "stage1-2"]
    assert judged.up(3, "n3", device="NVIDIA A100", answers={"transformer": "as an A100 rounds"}) == [
        "stage1-1", "stage1-3"
    ]  # fmt: skip
    assert len(judged.answers) == 2, "each model has its own answer"


def test_a_run_all_of_whose_nodes_are_refused_ends():
    judged = Judged(nodes=2)
    judged.up(0, "n0", files={"checkpoint_path": "c1"})
    with pytest.raises(StartFailed, match="stage1-1 on node n1 is refused: its file checkpoint_path"):
        judged.up(1, "n1", files={"checkpoint_path": "c1"})


def test_a_replica_that_was_still_starting_on_a_node_that_computes_wrongly_joins_no_more():
    judged = Judged()
    judged.up(0, "n0", files={"checkpoint_path": "c1"})
    assert judged.up(1, "n0") == [] and list(judged.refused) == ["stage1-0"]


def test_one_that_is_lost_while_it_waits_is_forgotten():
    judged = Judged()
    judged.up(0, "n0")
    judged.up(1, "n1", answers={"transformer": "other"})
    judged.run.staff.give_back("stage1-1", "its node drains")
    assert judged.up(2, "n2") == ["stage1-0", "stage1-2"] and not judged.refused
