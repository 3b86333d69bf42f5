"""Five random schedules of failures on real Ray, two of them with the toy model; scripts/chaos runs more.

LTX_RAY_CHAOS_SEED sets the first seed.
"""

from __future__ import annotations

import os

import pytest

from tests.support.random_failures import Trials

pytestmark = pytest.mark.slow

FIRST = int(os.environ.get("LTX_RAY_CHAOS_SEED", "0"))
#: With the default seeds, nodes, ranks and drivers are killed with the toy model; with the fake one, drivers drain too.
SCHEDULES = [("toy", 2), ("toy", 3), ("fake", 0), ("fake", 1), ("fake", 4)]


@pytest.fixture(scope="module")
def trials(request, shared_cluster, tmp_path_factory) -> Trials:
    shared_cluster.heal()
    # With the toy model one rank a replica and two failures, to save time; scripts/chaos has more of both.
    tp = 1 if request.param == "toy" else 2
    return Trials(shared_cluster, request.param, tmp_path_factory.mktemp(f"trials-{request.param}"), tp)


@pytest.mark.parametrize(("trials", "number"), SCHEDULES, indirect=["trials"])
def test_whatever_happens_every_row_is_there_once_with_its_own_bits(trials, number):
    seed = FIRST + number
    outcome = trials.run(seed)
    assert outcome.wrong == [], f"LTX_RAY_CHAOS_SEED={seed}: {outcome}"
    assert outcome.failures, f"LTX_RAY_CHAOS_SEED={seed}: nothing happened"
