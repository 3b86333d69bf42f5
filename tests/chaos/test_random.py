"""Five random schedules of failures on real Ray with the toy model. LTX_RAY_CHAOS_SEED sets the first seed."""

from __future__ import annotations

import os

import pytest

from tests.support.random_failures import Trials

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("LTX_RAY_CHAOS_SEED", "0"))


@pytest.fixture(scope="module")
def trials(shared_cluster, tmp_path_factory) -> Trials:
    shared_cluster.heal()
    # One rank a replica and two failures, to save time; scripts/chaos has more of both.
    return Trials(shared_cluster, "toy", tmp_path_factory.mktemp("trials"), tp=1)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 5))
def test_whatever_happens_every_row_is_there_once_with_its_own_bits(trials, seed):
    outcome = trials.run(seed)
    assert outcome.wrong == [], f"LTX_RAY_CHAOS_SEED={seed}: {outcome}"
    assert outcome.failures, f"LTX_RAY_CHAOS_SEED={seed}: nothing happened"
