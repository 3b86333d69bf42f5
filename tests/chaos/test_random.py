"""Five random schedules of mishaps on real Ray with the toy model. LTX_RAY_CHAOS_SEED: the first of their seeds."""

from __future__ import annotations

import os

import pytest

from tests.support.mishaps import Trials

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("LTX_RAY_CHAOS_SEED", "0"))


@pytest.fixture(scope="module")
def trials(shared_world, tmp_path_factory) -> Trials:
    shared_world.heal()
    # one rank a replica and two mishaps, for the time it takes; scripts/chaos has two and more
    return Trials(shared_world, "toy", tmp_path_factory.mktemp("trials"), tp=1)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 5))
def test_whatever_happens_every_row_is_there_once_with_its_own_bits(trials, seed):
    outcome = trials.run(seed)
    assert outcome.wrong == [], f"LTX_RAY_CHAOS_SEED={seed}: {outcome}"
    assert outcome.mishaps, f"LTX_RAY_CHAOS_SEED={seed}: nothing happened"
