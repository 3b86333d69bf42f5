"""What stages wait for is measured, and told to people."""

from __future__ import annotations

from types import SimpleNamespace

from ltx_ray.dataset.run_summary import wait_lines
from ltx_ray.driver.policy import Policy
from ltx_ray.driver.waits import WaitReport, Waits, WaitWindow
from ltx_ray.stages import OUTPUT_STAGES


def policy_with(**replicas) -> Policy:
    policy = Policy(queue_depth=1)
    for name, roles in replicas.items():
        policy.add_replica(name, roles)
    return policy


def dispatch_all(policy: Policy) -> dict[str, str]:
    started = {}
    while (call := policy.next_dispatch()) is not None:
        started[call.item] = str(call.stage)
    return started


def causes(policy: Policy) -> dict[str, tuple[int, int, str]]:
    return {str(stage): (servers, idle, cause) for stage, servers, idle, cause in policy.idleness()}


def test_a_stage_waits_for_the_next_one_while_its_queue_is_full():
    policy = policy_with(t=("text",), a=("stage1",), b=("stage2",), d=OUTPUT_STAGES)
    for number in range(12):
        if policy.capacity():
            policy.admit(f"i{number}")
        for item, stage in dispatch_all(policy).items():
            if stage != "decode":
                policy.call_finished(item, 1.0)
    dispatch_all(policy)
    found = causes(policy)
    assert found["stage2"] == (1, 1, "decode")
    assert found["decode"][1] == 0


def test_a_stage_without_items_waits_for_the_last_one_before_it_that_has_some():
    policy = policy_with(t=("text",), a=("stage1",), b=("stage2",), d=OUTPUT_STAGES)
    assert {cause for _, _, cause in causes(policy).values()} == {"rows"}
    policy.admit("i0")
    dispatch_all(policy)
    policy.admit("i1")  # Text is busy with the first one.
    assert causes(policy)["stage1"] == (1, 1, "text") and causes(policy)["stage2"][2] == "text"


def test_results_that_take_all_the_memory_are_a_cause():
    policy = policy_with(t=("text",), a=("stage1",))
    policy.max_bytes = 1.0
    policy.admit("i0")
    dispatch_all(policy)
    policy.call_finished("i0", 1.0, nbytes=100)
    dispatch_all(policy)
    policy.admit("i1")
    assert dispatch_all(policy) == {}
    assert causes(policy)["text"] == (1, 1, "memory")


def sampled(seconds: float, servers: int, idle: int, cause: str = "decode") -> Waits:
    waits = Waits()
    policy = SimpleNamespace(idleness=lambda: [("stage2", servers, idle, cause)])
    for half_second in range(int(2 * seconds) + 1):
        waits.look(policy, 100.0 + half_second / 2)
    return waits


def test_shares_are_of_the_time_of_a_stages_replicas():
    waits = Waits()
    window = WaitWindow(waits)
    policy = SimpleNamespace(idleness=lambda: [("stage2", 10, 4, "decode"), ("decode", 2, 0, "stage2")])
    for second in range(11):
        waits.look(policy, float(second))
    shares = window.read()
    assert shares.by_stage() == {"stage2": {"decode": 0.4}}
    assert shares.of("decode", "load_latents") == 0.4 and shares.of("text") == 0.0
    assert window.read().by_stage() == {}, "a window begins anew"


def test_samples_that_come_too_soon_are_passed_over():
    waits = Waits()
    policy = SimpleNamespace(idleness=lambda: [("stage2", 1, 1, "decode")])
    for tenth in range(11):
        waits.look(policy, tenth / 10)
    assert waits.there["stage2"] == 1.0


def test_events_and_metrics_are_told_once_a_minute():
    waits, told, measured = sampled(120.0, 2, 1), [], []
    events = SimpleNamespace(emit=lambda event, **fields: told.append((event, fields)))
    metrics = SimpleNamespace(reach=lambda *row: measured.append(row))
    report = WaitReport(Waits(), events, metrics)
    report._waits = report._minute._waits = report._whole._waits = waits
    for second in (0.0, 30.0, 61.0):
        report.tell(second)
    assert told == [("waits", {"shares": {"stage2": {"decode": 0.5}}})]
    assert measured == [("ltx_ray_waited_seconds", 120.0, "stage2", "decode")]
    assert report.whole_run() == report.shares == {"stage2": {"decode": 0.5}}


def test_the_largest_share_comes_first_and_small_ones_are_left_out():
    shares = {"stage2": {"decode": 0.63, "rows": 0.05}, "stage1": {"stage2": 0.8}}
    assert wait_lines(shares) == ["stage1 waits for stage2 80% of the time", "stage2 waits for decode 63% of the time"]
