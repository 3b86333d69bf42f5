"""Text and decode on cards of their own get another one of the DiT, when that gives more clips."""

from __future__ import annotations

from dataclasses import replace

from ltx_ray.config import PoolSpec
from ltx_ray.driver.own_cards import OwnCards
from ltx_ray.pools.pool import Pool
from ltx_ray.stages import OUTPUT_STAGES
from tests.support.fake_cluster import SPEC, StaffedRun

BOTH = ("stage1", "stage2")


class Run:
    """A DiT of 40 replicas on cards of their own, and one card of text and decode, all of whose places are taken."""

    def __init__(self, gpus=1.0, roles=BOTH, ranks=1):
        specs = [
            PoolSpec("text", ("text",), 1, 1, SPEC, 1.0, 0.4, 1),
            PoolSpec("stage1", roles, 28, ranks, SPEC, gpus_per_rank=gpus),
            PoolSpec("stage2", roles[::-1], 12, ranks, SPEC, gpus_per_rank=gpus),
            PoolSpec("decode", OUTPUT_STAGES, 3, 1, SPEC, 8.0, 0.2, 3),
        ]
        self.pools = [Pool(spec, 4, {f"{spec.name}-{n}": True for n in range(spec.replicas)}) for spec in specs]
        self.cards, self.now = OwnCards(), 0.0

    def look(self, decode: float, placing=None, seconds=60.0, leaving=False) -> tuple[str, str] | None:
        self.now += seconds
        moved = self.cards.look(self.pools, {"text": 0.1, "decode": decode}, placing or {}, leaving, self.now)
        return None if moved is None else (moved.giver, moved.taker)

    def fill(self):
        """The pool grows onto its new card, and all of it comes up."""
        pool = self.pools[3]
        pool.spec = replace(pool.spec, replicas=pool.spec.most)
        pool.replicas = {f"decode-{n}": True for n in range(pool.spec.replicas)}

    @property
    def sizes(self):
        return [self.pools[1].spec.replicas, self.pools[2].spec.replicas, self.pools[3].spec.most]


def test_cards_move_one_by_one_until_the_pool_no_longer_bounds_the_run():
    run = Run()
    assert run.look(6.0) == ("stage1", "decode") and run.sizes == [27, 12, 8]
    assert run.look(12.0) is None, "its replicas are not there yet"
    run.fill()
    assert run.look(12.0, seconds=30.0) is None, "they have not been measured"
    assert run.look(12.0, seconds=30.0) == ("stage1", "decode") and run.sizes == [26, 12, 13]
    run.fill()
    assert run.look(12.0) is None and run.sizes == [26, 12, 13]


def test_a_card_that_would_win_less_than_it_costs_stays():
    assert Run().look(3.05) is None
    assert Run().look(2.0) is None


def test_cards_that_are_shared_divided_or_fixed_by_the_user_stay():
    assert Run(gpus=0.6).look(9.0) is None
    assert Run(ranks=2).look(9.0) is None
    assert Run(roles=("stage1",)).look(9.0) is None


def test_a_card_on_which_nothing_finds_a_place_goes_back_for_good():
    run = Run()
    run.look(9.0)
    assert run.pools[3].spec.replicas == 8, "they are asked for at once"
    run.pools[3].replicas |= dict.fromkeys(["decode-3", "decode-4", "decode-5"], False)
    assert run.look(9.0, {"decode-5": 61.0}, leaving=True) is None, "the card is still in use by the DiT"
    assert run.look(9.0, {"decode-5": 61.0}) == ("decode", "stage1") and run.sizes == [28, 12, 3]
    run.fill()
    assert run.look(9.0) is None


def test_a_pool_whose_own_card_is_lost_gets_one_and_others_do_not_ask_for_it_meanwhile():
    run = Run()
    run.pools[3].replicas = {"decode-0": True, "decode-7": False, "decode-8": False}
    run.pools[1].replicas |= {"stage1-4": False, "stage1-5": False}
    waiting = {"decode-7": 59.0, "stage1-4": 400.0, "stage1-5": 400.0}
    assert run.look(6.0, waiting) is None, "a short wait is no reason"
    waiting["decode-7"] = 119.0
    assert run.look(6.0, waiting) == ("stage1", "decode")
    assert run.sizes == [25, 12, 6], "of 28, two wait for places and one leaves; there is room for five decoders more"
    run.fill()
    run.look(2.0)
    assert run.sizes == [27, 12, 6]


def test_a_pool_that_lacks_places_and_bounds_nothing_gets_no_card():
    run = Run()
    run.pools[3].replicas = {"decode-0": True, "decode-7": False}
    assert run.look(1.0, {"decode-7": 500.0}) is None


def test_the_last_replicas_of_the_dit_that_run_keep_their_cards():
    run = Run()
    for pool in run.pools[1:3]:
        pool.replicas = dict.fromkeys(pool.replicas, False) | {f"{pool.spec.name}-0": True}
    run.pools[3].replicas = {"decode-0": True, "decode-7": False}
    lost = {name: 400.0 for pool in run.pools for name, ready in pool.replicas.items() if not ready}
    assert run.look(39.0, lost) is None and run.sizes == [28, 12, 3]


def test_decoders_that_keep_up_with_the_replicas_of_the_dit_that_run_get_no_card():
    run = Run()
    run.pools[1].replicas = {f"stage1-{n}": n < 8 for n in range(28)}
    lost = {f"stage1-{n}": 400.0 for n in range(8, 28)}
    assert run.look(5.0, lost) is None, "of 40, 20 run, and decoders for 24 clips are ready"


def test_what_others_do_not_ask_for_is_theirs_again_when_the_pool_needs_fewer_than_the_card_takes():
    run = Run()
    run.pools[1].replicas["stage1-4"] = False
    assert run.look(6.0, {"stage1-4": 400.0}) == ("stage1", "decode") and run.sizes == [26, 12, 8]
    run.pools[3].spec = replace(run.pools[3].spec, replicas=3)  # as driver/pool_sizer.py has decided meanwhile
    assert run.look(1.0) is None and run.sizes == [27, 12, 8]


def test_a_card_that_was_in_use_is_not_given_back_when_a_decoder_is_lost_later():
    run = Run()
    run.look(6.0)
    run.fill()
    assert run.look(6.0) is None, "all of it is up"
    run.pools[3].replicas["decode-5"] = False
    assert run.look(6.0, {"decode-5": 61.0}) is None and run.sizes == [27, 12, 8]


def test_the_replica_of_the_dit_leaves_after_its_call_and_decoders_take_its_place():
    run = StaffedRun(stage1=3, decode=1)
    shares = {"text": 0.4, "stage1": 1.0, "decode": 0.2}
    for pool in run.staff.pools:
        pool.spec = replace(pool.spec, gpus_per_rank=shares[pool.spec.name], most=pool.spec.most and 1)
    names = run.turn()
    run.come_up(*names)
    run.come_up(*run.turn())
    for stage, seconds in (("text", 0.1), ("stage1", 10.0), ("stage2", 5.0), ("decode", 15.0)):
        run.policy._seconds[stage].add(seconds)
    started = run.turn(now=100.0)
    assert [(event["role"], event["to"]) for event in run.told("card_moved")] == [("stage1", "decode")]
    assert "decode gets a card of stage1, because with it the run makes more clips" in run.said
    assert len(run.told("gang_leaving")) == 1 and not any(name.startswith("stage1") for name in started)
    assert any(name.startswith("decode") for name in [*started, *run.turn(now=111.0)])


def test_replicas_of_the_dit_that_wait_for_a_place_leave_the_card_to_decoders():
    run = StaffedRun(stage1=4, decode=2)
    shares = {"text": 0.4, "stage1": 1.0, "decode": 0.2}
    for pool in run.staff.pools:
        pool.spec = replace(pool.spec, gpus_per_rank=shares[pool.spec.name], most=pool.spec.most and 2)
    run.turn()
    run.come_up("text-0", "stage1-0", "stage1-1", "stage1-2", "decode-0")
    run.replicas.waits["stage1-3"] = 61.0
    assert run.turn(now=61.0) == ["decode-1"]
    for stage, seconds in (("text", 0.1), ("stage1", 10.0), ("stage2", 5.0), ("decode", 15.0)):
        run.policy._seconds[stage].add(seconds)
    run.replicas.waits |= {"decode-1": 69.0, "stage1-3": 130.0}
    started = run.turn(now=130.0)
    [left] = run.told("gang_leaving")
    assert run.told("gang_given_back")[0]["replica"] == "stage1-3" and left["replica"] in (
        "stage1-0",
        "stage1-1",
        "stage1-2",
    )
    assert not any(name.startswith("stage1") for name in started)
