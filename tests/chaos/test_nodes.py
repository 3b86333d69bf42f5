"""Failures of ranks, nodes, drivers and disks on a real cluster: every row is there once, with its own bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections import Counter

import pytest

from ltx_ray.config import RunLimits, Selection
from ltx_ray.placement.sizing import ParallelConfig
from tests.support.local_cluster import HANGS_AFTER, Driver, Job, rows, undisturbed, wait_for

pytestmark = pytest.mark.slow

SEPARATE = ParallelConfig(stage1=1, stage2=1)
SHARED = ParallelConfig(stage1=1, stage2=0)
SHARED_BY_TWO = ParallelConfig(tp=2, stage1=1, stage2=0)


def whole(job: Job, count: int) -> dict[str, dict]:
    """The index, after asserting that nothing is wrong and that it has all `count` rows."""
    index = job.out.index()
    wrong = job.check([f"r{n}" for n in range(count)], undisturbed(index, job.folder / "alone"))
    assert wrong == [] and len(index) == count
    return index


def pid(gang: dict, rank: int) -> int:
    return gang["ranks"][rank]["pid"]


def node(gang: dict) -> str:
    return gang["ranks"][0]["node"]


def test_ranks_are_killed_one_hangs_one_raises_alone_and_memory_runs_out(job):
    """Stage 2 hangs with the first row until stage 1 has finished the others, during which its ranks are killed."""
    orders = ["[[stage2:stuck:1]]", "plain", "[[stage1:lone:1]]", "[[stage2:memory:1]]", "[[stage1:gate]]"]
    driver = job.start(rows(*orders), time_passes=True)
    first = job.until(lambda: job.at_gate("stage1") == 2 and job.out.gangs("stage1"), "a gang at the gate")[-1]
    os.kill(pid(first, 1), signal.SIGKILL)
    second = job.until(lambda: [g for g in job.out.gangs("stage1") if g["t"] > first["t"]], "another gang")[0]
    os.kill(pid(second, 0), signal.SIGKILL)
    job.open_gate()
    job.until(lambda: len({e["id"] for e in job.out.events("call") if e["stage"] == "stage1"}) == 5, "all of stage 1")
    job.until(lambda: job.out.gangs("decode"), "a decoder, which may take its time to start")
    job.pass_time(RunLimits().call_timeout + 1)
    driver.ends(0)
    index = whole(job, 5)
    lost = Counter(event["role"] for event in job.out.events("gang_lost"))
    assert lost == {"stage1": 3, "stage2": 2}
    reasons = " ".join(event["reason"] for event in job.out.events("gang_lost"))
    for what in ("stage2 took longer than 7200 s", "told to fail alone", "OutOfMemoryError"):
        assert what in reasons
    assert all(index[name]["attempts"] >= 2 for name in ("r0", "r2", "r3", "r4"))
    # Each of the two kills costs at most one row an attempt.
    assert sum(row["attempts"] - 1 for row in index.values()) <= 5


def test_a_stopped_process_is_a_hanging_rank(job):
    """After SIGSTOP a process neither answers nor ends when asked."""
    driver = job.start(rows("[[stage1:gate]]"), parallel=SHARED_BY_TWO, time_passes=True)
    job.until(lambda: job.at_gate("stage1") == 2 and job.out.gangs("decode"), "both ranks at the gate")
    (gang,) = job.out.gangs("diffusion")
    os.kill(pid(gang, 1), signal.SIGSTOP)
    job.open_gate()
    job.pass_time(RunLimits().call_timeout + 1)
    driver.ends(0)
    whole(job, 1)
    assert len(job.out.events("gang_lost")) == 1


def test_the_death_of_an_idle_rank_costs_no_row_an_attempt(job):
    driver = job.start(rows(*["[[stage1:gate]]"] * 3))
    gang = job.until(lambda: job.out.gangs("stage2"), "stage 2")[0]
    os.kill(pid(gang, 1), signal.SIGKILL)
    job.until(lambda: job.out.events("gang_lost"), "a lost gang")
    job.open_gate()
    driver.ends(0)
    assert {row["attempts"] for row in whole(job, 3).values()} == {1}
    (lost,) = job.out.events("gang_lost")
    assert lost["role"] == "stage2" and "died while idle" in lost["reason"]


def test_latents_that_die_with_their_node_are_made_again(job):
    # Stage 2 holds the first row until stage 1 has finished the others.
    driver = job.start(rows("[[stage1:big]] [[stage2:gate]]", *["[[stage1:big]]"] * 3))
    job.until(lambda: sum(e["stage"] == "stage1" for e in job.out.events("call")) == 4, "stage 1 of every row")
    (gang,) = job.out.gangs("stage1")
    (other,) = job.until(lambda: job.out.gangs("stage2"), "stage 2")
    assert node(gang) != node(other)
    job.cluster.remove_node(node(gang))
    job.cluster.add_node()
    job.open_gate()
    driver.ends(0)
    index = whole(job, 4)
    assert {row["attempts"] for row in index.values()} == {1}
    again = Counter(event["id"] for event in job.out.events("call") if event["stage"] == "stage1")
    assert [again[name] for name in ("r1", "r2", "r3")] == [2, 2, 2]


def test_replicas_of_a_node_that_drains_leave_after_their_calls(job):
    """Nothing is lost, no row is charged, and what takes their place is there before they have gone."""
    parallel = ParallelConfig(guidance_parallel=3, stage1=2, stage2=0)
    driver = job.start(rows(*["[[stage1:gate]]"] * 6), parallel=parallel)
    gangs = job.until(lambda: len(found := job.out.gangs("diffusion")) == 2 and found, "both gangs")
    assert node(gangs[0]) != node(gangs[1])
    job.cluster.add_node()
    job.cluster.drain_node(node(gangs[1]))
    job.until(lambda: len(job.out.gangs("diffusion")) == 3, "a successor")
    assert not job.out.events("gang_lost")
    job.open_gate()
    driver.ends(0)
    index = whole(job, 6)
    assert {row["attempts"] for row in index.values()} == {1}
    left = {event["replica"] for event in job.out.events("gang_given_back") if event["reason"] == "its node drains"}
    assert gangs[1]["replica"] in left and gangs[0]["replica"] not in left
    assert {event["replica"] for event in job.out.events("gang_leaving")} == left


def test_a_node_that_never_comes_back_does_not_end_the_run(job):
    parallel = ParallelConfig(guidance_parallel=3, stage1=2, stage2=0)
    driver = job.start(rows(*["[[stage1:gate]]"] * 4), parallel=parallel, time_passes=True)
    gangs = job.until(lambda: len(found := job.out.gangs("diffusion")) == 2 and found, "both gangs")
    job.until(lambda: job.out.gangs("text") and job.out.gangs("decode"), "the others")
    assert node(gangs[0]) != node(gangs[1])
    job.cluster.remove_node(node(gangs[1]))
    job.until(
        lambda: sum(event["role"] == "diffusion" for event in job.out.events("gang_starting")) == 3,
        "successor of the lost gang, which finds no place",
    )
    job.pass_time(RunLimits().start_timeout + 1)
    job.open_gate()
    driver.ends(0)
    index = whole(job, 4)
    assert {row["stage1_replica"] for row in index.values()} == {gangs[0]["replica"]}
    assert len(job.out.gangs("diffusion")) == 2


def test_a_pool_larger_than_any_node_is_refused_after_the_start_timeout(job):
    driver = job.start(rows("one"), parallel=ParallelConfig(tp=4, stage1=1, stage2=0), time_passes=True)
    # Replicas that have a place would run out of time as well.
    job.until(lambda: job.out.gangs("text") and job.out.gangs("decode"), "the others")
    job.pass_time(RunLimits().start_timeout + 1)
    log = driver.ends(1)
    assert "pool diffusion: no place for a replica in 1800 s; it needs 4 x (1 CPU, 0 GPU) on one node" in log
    assert "Traceback" not in log
    assert job.out.index() == {} and job.out.failed() == {}
    assert job.check([], {}) == []


def test_replicas_come_up_on_a_node_that_joins(job):
    driver = job.start(rows(*["[[stage1:gate]]"] * 8), parallel=ParallelConfig(tp=2, max_replicas=5))
    job.until(lambda: job.out.gangs("stage1"), "stage 1")
    added = job.cluster.add_node()
    job.until(lambda: added in {node(gang) for gang in job.out.events("gang_started")}, "gang on the new node")
    job.open_gate()
    driver.ends(0)
    whole(job, 8)
    assert not job.out.events("gang_lost")


def waiting_runs(drivers: list[Driver]) -> int:
    """How many have said that they wait for another run."""
    return sum("is in use by run" in driver.log for driver in drivers)


def test_a_killed_driver_is_followed_by_two_of_which_one_goes_on(job):
    manifest = rows(*["plain"] * 3, *["[[text:gate]]"] * 9)
    first = job.start(manifest, parallel=SEPARATE)
    job.until(lambda: len(job.out.events("item_finished")) == 3, "third row")
    first.kill()
    assert job.cluster.leaks() == []
    before = job.out.index()
    assert set(before) == {"r0", "r1", "r2"}
    drivers = [job.start(manifest, parallel=SEPARATE) for _ in range(2)]
    wait_for(lambda: waiting_runs(drivers), "a run that waits for the other")
    job.open_gate()
    logs = [driver.ends(0) for driver in drivers]
    after = whole(job, 12)
    # The equal `finished_at` shows that they were not rendered again.
    assert all(after[name] == row for name, row in before.items())
    assert waiting_runs(drivers) == 1
    assert any("0 rendered, 12 done before" in log for log in logs)


def test_of_shards_of_one_output_one_goes_on_and_the_others_are_refused(job):
    """One is refused, one waits as long as it was told to. Each keeps the failures of the others."""
    manifest = rows("[[stage1:gate]]", *["a cat"] * 7, "[[stage1:row]]")
    shards = [{"parallel": SHARED, "selection": Selection(shard=(number, 3))} for number in range(3)]
    first = job.start(manifest, **shards[0])
    job.until(lambda: job.out.events("gang_started"), "the first run's replica")
    refused = job.start(manifest, **shards[1]).ends(1)  # by the ValueError that the command line turns into exit code 2
    assert "in use by run" in refused and "waiting" not in refused
    waiting = job.start(manifest, **shards[2], wait_for_output=600.0)
    job.until(lambda: "waiting for it for up to 600 s" in waiting.log, "the shard that waits")
    job.open_gate()
    assert "finished: 3 rows, " in first.ends(0) and "finished: 3 rows, " in waiting.ends(3)
    assert "finished: 3 rows, " in job.start(manifest, **shards[1]).ends(0)
    assert set(job.out.index()) == {f"r{number}" for number in range(8)}
    assert set(job.out.failed()) == {"r8"} and not list(job.out.folder.glob("state/wal/*"))


def test_a_killed_driver_leaves_no_row_twice_and_the_next_run_has_all(job):
    """Killed again and again, at moments that are spread over commits and folds."""
    seen = 0
    manifest = rows(*(f"[[text:gate:{number}]] [[stage1:slow:0.1]]" for number in range(4) for _ in range(8)))
    for number, moment in enumerate((0.0, 0.4, 1.1)):
        job.open_gate(str(number))
        driver = job.start(manifest, parallel=SEPARATE)
        job.until(lambda seen=seen: len(job.out.index()) > seen, "another row")
        time.sleep(moment)
        driver.kill()
        read, seen = job.out.read(), len(job.out.index())  # which fail when a row is there twice
        assert set(read) <= set(job.out.index()) and seen <= 8 * (number + 1)
    before = job.out.index()
    # As a driver leaves it that is killed while it removes a run's segments.
    (job.out.folder / "state/wal/killed").mkdir()
    job.open_gate("3")
    job.start(manifest, parallel=SEPARATE).ends(0)
    after = whole(job, 32)
    assert set(job.out.read()) == set(after) and all(after[name] == row for name, row in before.items())
    assert not list(job.out.folder.glob("state/wal/*"))


def test_a_sigterm_drains_in_time_though_calls_of_minutes_are_under_way(job):
    """The decode pool finishes its clip; calls of stage 1 are abandoned."""
    manifest = rows("[[decode:gate:1]]", *["[[stage1:gate]]"] * 4)
    # The decode pool has longer than the test takes.
    driver = job.start(manifest, parallel=SEPARATE, limits=RunLimits(grace=2 * HANGS_AFTER))
    job.until(lambda: job.at_gate("decode") and job.at_gate("stage1"), "calls of decode and stage 1")
    driver.signal(signal.SIGTERM)
    job.until(lambda: "draining: SIGTERM" in driver.log, "drain")
    job.open_gate("1")
    driver.ends(4)
    assert job.check(["r0"], undisturbed(job.out.index(), job.folder / "alone")) == []
    before = job.out.index()
    assert set(before) == {"r0"}
    assert json.loads((job.out.folder / "run.json").read_text())["state"] == "drained"
    job.open_gate()
    job.start(manifest, parallel=SEPARATE).ends(0)
    assert whole(job, 5)["r0"] == before["r0"] and len(list((job.out.folder / "runs").iterdir())) == 1
    assert {row["attempts"] for row in job.out.index().values()} == {1}


def test_a_second_signal_ends_the_run_at_once_and_nothing_is_lost(job):
    """A second SIGTERM ends the driver at once. `ray job stop` sends SIGKILL three seconds after SIGTERM."""
    manifest = rows("plain", "[[decode:gate]]", "[[stage1:gate]]", "plain")

    def decodings() -> int:
        calls = job.out.events("call", every_run=True)
        return sum(call["stage"] == "stage2" and call["id"] == "r1" for call in calls) if job.out.index() else 0

    insistence = [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
    for times, (insistent, code) in enumerate(insistence):
        # Without the second signal, the run would wait longer than the test.
        driver = job.start(manifest, parallel=SEPARATE, limits=RunLimits(grace=2 * HANGS_AFTER))
        job.until(lambda times=times: decodings() > times, "decoding of the second row")
        driver.signal(signal.SIGTERM)
        job.until(lambda driver=driver: "draining: SIGTERM" in driver.log, "drain")
        time.sleep(0.5)  # signals that come together are one
        assert driver.running
        driver.signal(insistent)
        assert driver.wait() == code
        assert job.cluster.leaks() == []
        assert set(job.out.index()) == {"r0"}
    before = job.out.index()
    job.open_gate()
    job.start(manifest, parallel=SEPARATE).ends(0)
    assert whole(job, 4)["r0"] == before["r0"]


@pytest.fixture
def full_disk(job):
    """A full disk for clips: a file system of four pages or, where none can be mounted, the engine's report of one.

    Yields a prompt, options, and a function that frees space.
    """
    clips = job.out.folder / "clips"
    clips.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(clips)], stderr=subprocess.PIPE
    ).returncode:
        yield "[[decode:full:3]]", {}, lambda: None
        return
    (clips / "filler").write_bytes(bytes(16384))
    engines = dict.fromkeys(("text", "diffusion", "decode"), "tests.support.engines:BriefStoreRetries")
    yield "plain", {"engines": engines}, (clips / "filler").unlink
    subprocess.run(["umount", str(clips)], check=True)


def test_a_full_disk_costs_no_latents_and_retry_goes_on_from_them(job, full_disk):
    prompt, options, clean_up = full_disk
    assert job.start(rows(prompt, prompt), parallel=SHARED, **options).ends(3)
    failed = job.out.failed()
    assert set(failed) == {"r0", "r1"} and not job.out.index()
    for row in failed.values():
        assert (row["stage"], row["attempts"], row["error_class"]) == ("decode", 3, "infrastructure")
        kept = job.out.folder / "latents" / row["item_id"][:2] / f"{row['item_id']}.safetensors"
        assert os.strerror(errno.ENOSPC) in row["message"] or "disk is full" in row["message"]
        assert f"(latents kept in {kept})" in row["message"]
    clean_up()
    job.start(str(job.out.folder / "failed"), parallel=SHARED, retry_failed=True, **options).ends(0)
    whole(job, 2)
    stages = Counter(event["stage"] for event in job.out.events("call"))
    assert stages == {"text": 2, "load_latents": 2, "stage2": 2, "decode": 2}


def test_no_process_outlives_a_killed_driver_with_a_cluster_of_its_own(job):
    manifest = rows("plain", "[[text:gate]]")
    alone = {"parallel": SEPARATE, "ray_address": None}
    driver = job.start(manifest, **alone)
    job.until(lambda: job.out.events("item_finished"), "a row")
    assert len(driver.processes()) > 5
    driver.kill()
    wait_for(lambda: not driver.processes(), lambda: f"the end of {driver.processes()}")
