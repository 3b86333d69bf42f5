"""Nodes whose cards cannot load, that compute other bits, make NaN or are of another kind: named, and left out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator

import pytest

from ltx_ray.config import RunLimits
from ltx_ray.placement.sizing import ParallelConfig
from tests.support.local_cluster import FAKE, Job, LocalCluster, rows, undisturbed

pytestmark = pytest.mark.slow

#: Rows that keep all replicas busy until the gate opens, so that each pool comes up whole.
ROWS = 16
GATED = rows(*["[[stage1:gate]]"] * ROWS)


@pytest.fixture(scope="module")
def nodes() -> Iterator[LocalCluster]:
    """Three nodes with two GPUs each."""
    cluster = LocalCluster(workers=3, slots=8, gpus=2)
    yield cluster
    cluster.close()


@pytest.fixture
def cluster(nodes) -> LocalCluster:
    """That of `job`."""
    return nodes


def render(
    job: Job,
    engine: str,
    differs: list[str],
    until: Callable[[], object] | None = None,
    preflight: bool = False,
    kinds: tuple[str, ...] = ("diffusion",),
    max_attempts: int = RunLimits.max_attempts,
) -> str:
    """Render all rows while engines of these kinds differ on some nodes; the log. Every row has its own bits.

    One of the six cards is that of text and decode, and the others have a replica of the DiT each.
    No call of stage 1 that works ends before `until`, which is whether a node has been excluded where not given.
    """
    (job.out.folder / "_fake").mkdir(parents=True)
    (job.out.folder / "_fake" / "nodes").write_text(" ".join(differs))
    driver = job.start(
        GATED,
        parallel=ParallelConfig(),
        engines={**FAKE, **dict.fromkeys(kinds, f"tests.support.engines:{engine}")},
        preflight=preflight,
        limits=RunLimits(max_attempts=max_attempts),
    )
    job.until(until or (lambda: excluded(job)), "excluded node" if until is None else "failure")
    job.open_gate()
    log = driver.ends(0)
    index = job.out.index()
    assert job.check([f"r{n}" for n in range(ROWS)], undisturbed(index, job.folder / "alone")) == []
    assert len(index) == ROWS and "Traceback" not in log
    return log


def excluded(job: Job) -> set[str]:
    return {event["node"] for event in job.out.events("node_excluded")}


def dit_nodes(job: Job) -> set[str]:
    """Where replicas of the DiT have been ready."""
    gangs = [event for event in job.out.events("gang_started") if event["role"] in ("stage1", "stage2")]
    return {rank["node"] for gang in gangs for rank in gang["ranks"]}


def test_a_node_whose_cards_cannot_load_is_named_and_left_out(job, nodes):
    bad = nodes.nodes()[0]
    log = render(job, "LoadsNowhereOn", [bad], kinds=("text", "diffusion", "decode"))
    assert excluded(job) == {bad} and dit_nodes(job) <= set(nodes.nodes()) - {bad}
    assert "excluded for 5 min 00 s, because 2 of its 2 GPUs failed" in log


def test_a_node_that_lacks_a_package_is_excluded_at_its_first_gang(job, nodes):
    bad = nodes.nodes()[1]
    log = render(job, "LacksAPackageOn", [bad])
    assert excluded(job) == {bad} and dit_nodes(job) <= set(nodes.nodes()) - {bad}
    assert "needs the package fa3-fwd on every GPU node" in log


def test_a_node_that_computes_other_bits_is_refused_by_name(job, nodes):
    bad = nodes.nodes()[2]
    log = render(job, "OtherBitsOn", [bad], preflight=True)
    assert excluded(job) == {bad}
    assert "it computes wrong for the known-answer clip, and the other nodes right" in log


def test_a_node_with_another_torch_is_refused_by_name(job, nodes):
    bad = nodes.nodes()[0]
    log = render(job, "OtherTorchOn", [bad], preflight=True)
    assert excluded(job) == {bad} and 'its package versions are {"torch":"2.12"}' in log
    assert {row["versions"] for row in job.out.index().values()} == {'{"torch":"2.11"}'}


def test_gpus_of_a_second_model_are_left_out(job, nodes):
    # The model of the first that is up is the run's, so two nodes may be the odd ones.
    odd = nodes.nodes()[0]
    log = render(job, "OtherModelOn", [odd])
    others = set(nodes.nodes()) - {odd}
    assert excluded(job) in ({odd}, others) and dit_nodes(job) in (others, {odd})
    assert "--noise-device cpu allows both" in log


@pytest.mark.parametrize("preflight", [False, True])
def test_a_node_that_makes_nan_costs_no_row_and_is_excluded(job, nodes, preflight):
    bad = nodes.nodes()[1]

    def failed_there() -> bool:
        return bool(excluded(job)) or any("not finite" in event["message"] for event in job.out.events("warning"))

    log = render(job, "NotFiniteOn", [bad], failed_there, preflight)
    assert excluded(job) == {bad}
    assert {row["attempts"] for row in job.out.index().values()} == {1}
    assert "not finite there" in log


def test_a_card_whose_calls_keep_breaking_is_left_alone(job, nodes):
    # A row may meet all three cards, twice each.
    log = render(job, "CardBreaksOn", nodes.nodes(), lambda: job.out.events("card_parked"), max_attempts=20)
    parked = job.out.events("card_parked")
    assert parked and {event["where"].rpartition(", ")[2] for event in parked} == {"GPU 1"}
    assert "failed there again" in log


def test_of_two_models_the_one_with_the_most_cards_serves_with_what_its_nodes_have_installed(tmp_path, monkeypatch):
    """Only the nodes have FlashAttention-3, and not the driver."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "fa3_fwd_interface.py").touch()
    with monkeypatch.context() as of_nodes:
        of_nodes.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
        cluster = LocalCluster(workers=0, slots=8, gpus=2)
        mine = {cluster.add_node("H100"), cluster.add_node("H100")}
        cluster.add_node("A100")
    try:
        job = Job(cluster, tmp_path)

        def used() -> set[str]:
            return {rank["node"] for event in job.out.events("gang_started") for rank in event["ranks"]}

        driver = job.start(GATED, parallel=ParallelConfig())
        job.until(lambda: mine <= used(), "replica on each node")
        job.open_gate()
        log = driver.ends(0)
        assert "the GPUs of this run are H100; left alone: " in log and "(A100)" in log
        assert used() == mine
        assert {json.loads(row["numerics"])["attention"] for row in job.out.index().values()} == {"fa3"}
        assert job.check([f"r{n}" for n in range(ROWS)], undisturbed(job.out.index(), job.folder / "alone")) == []
        job.close()
    finally:
        cluster.close()
