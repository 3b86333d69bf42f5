"""A run ends when too many of its last rows have failed, whatever it or earlier runs have finished before."""

from __future__ import annotations

from ltx_ray.driver.outcomes import Outcomes
from ltx_ray.planning.row_images import ImageOutOfReach
from tests.support.schedules import HashingBuilder
from tests.support.simulated_runs import run


def outcomes(limit=None, **kinds) -> Outcomes:
    made = Outcomes(limit)
    for kind, rows in kinds.items():
        made.add(kind, rows)
    return made


def test_half_of_a_hundred_rows_is_the_limit_unless_another_is_given():
    assert outcomes(rendered=48, row=51).too_many_failed() is None, "these are 99"
    assert outcomes(rendered=50, row=50).too_many_failed() is None
    assert outcomes(rendered=49, row=51).too_many_failed() == (0.51, 100, "by their own fault", 0.5)


def test_a_limit_that_is_given_counts_from_ten_rows():
    assert outcomes(0.1, rendered=7, row=2).too_many_failed() is None
    found = outcomes(0.1, rendered=8, infrastructure=2).too_many_failed()
    assert found == (0.2, 10, "because of the infrastructure", 0.1)
    assert outcomes(1.0, row=600).too_many_failed() is None


def test_faults_of_rows_and_of_the_infrastructure_are_counted_apart():
    assert outcomes(0.5, rendered=20, row=40, infrastructure=40).too_many_failed() is None


def test_only_the_last_five_hundred_rows_count():
    seen = outcomes(0.5, rendered=1_000_000)
    seen.add("infrastructure", 250)
    assert seen.too_many_failed() is None
    seen.add("infrastructure")
    assert seen.too_many_failed() is not None
    seen.add("rendered", 500)
    assert seen.too_many_failed() is None


def test_illegal_rows_count_against_a_limit_that_is_given_alone():
    """Without one, a bad row never stops the others."""
    default, given = Outcomes(None), Outcomes(0.5)
    for seen in (default, given):
        seen.add_illegal(200)
    assert default.too_many_failed() is None and given.too_many_failed() is not None


class OutOfReach(HashingBuilder):
    """The store of all images does not answer."""

    def item(self, request, digest=None):
        if request.images:
            raise ImageOutOfReach(request.images[0].path, "nobody answers")
        return super().item(request)


def test_rows_whose_images_are_out_of_reach_stop_a_run_as_other_failures_of_the_infrastructure_do(tmp_path):
    """And no other kind: illegal rows do not count without a limit."""
    with_image = [{"id": f"i{n}", "prompt": "x", "images": [{"path": "a.png"}]} for n in range(3000)]
    driver, _ = run(tmp_path, with_image)
    driver.tracker.plan.builder = OutOfReach()
    driver.run(driver.tracker.plan.open())
    assert driver.too_many_failed and driver.counts["failed"] < 3000 and not driver.counts["illegal"]
