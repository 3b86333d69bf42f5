"""The line before a stage: oldest first, by kind, and nobody passed over unseen."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ltx_ray.driver.queue import FairQueue

KINDS = "abc"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 99), st.sampled_from(KINDS)),
            st.tuples(st.just("pop"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        ),
        max_size=60,
    )
)
def test_it_serves_as_a_sorted_list_would(steps):
    line, waiting, passed = FairQueue(), {}, {}
    for step in steps:
        if step[0] == "push":
            _, order, kind = step
            if order in waiting:
                continue
            line.push(f"i{order}", order, kind)
            waiting[order], passed[order] = kind, 0
        elif waiting:
            rank = dict(zip(KINDS, step[1]))
            expected = min(waiting, key=lambda order: (rank[waiting[order]], order))
            assert line.best(rank.__getitem__) == (rank[waiting[expected]], expected, waiting[expected])
            assert line.pop(waiting.pop(expected)) == f"i{expected}"
            for order in waiting:
                passed[order] += order < expected
        assert len(line) == len(waiting) and bool(line) == bool(waiting)
        assert {kind for kind in KINDS if line.has(kind)} == set(waiting.values())
        if waiting:
            oldest = min(waiting)
            assert line.oldest()[:2] == (oldest, waiting[oldest])
            assert line.oldest()[2] >= passed[oldest], "more have passed it than it knows"


def test_those_ahead_do_not_pass_over():
    line = FairQueue()
    for n in range(5):
        line.push(f"i{n}", n, "a")
    for n in range(5):
        assert line.oldest() == (n, "a", 0)
        line.pop("a")


def test_younger_ones_do():
    line = FairQueue()
    line.push("lone", 0, "b")
    for n in range(1, 5):
        line.push(f"i{n}", n, "a")
        line.pop("a")
        assert line.oldest() == (0, "b", n)


def test_one_that_comes_back_is_the_oldest_again():
    line = FairQueue()
    line.push("i0", 0, "a")
    line.push("i1", 1, "a")
    line.pop("a")
    line.push("i2", 2, "b")
    line.push("i0", 0, "a")
    assert line.oldest() == (0, "a", 0)
    assert [line.pop("a"), line.pop("a"), line.pop("b")] == ["i0", "i1", "i2"]
