"""The queue before a stage: the order in which it serves groups, and how it counts items that are passed over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ltx_ray.driver.queue import FairQueue

GROUPS = "abc"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("push"), st.integers(0, 99), st.sampled_from(GROUPS)),
            st.tuples(st.just("pop"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        ),
        max_size=60,
    )
)
def test_it_serves_as_a_sorted_list_would(steps):
    queue, waiting, passed = FairQueue(), {}, {}
    for step in steps:
        if step[0] == "push":
            _, order, group = step
            if order in waiting:
                continue
            queue.push(f"i{order}", order, group)
            waiting[order], passed[order] = group, 0
        elif waiting:
            preference = dict(zip(GROUPS, step[1]))
            expected = min(waiting, key=lambda order: (preference[waiting[order]], order))
            assert queue.best(preference.__getitem__) == (preference[waiting[expected]], expected, waiting[expected])
            assert queue.pop(waiting.pop(expected)) == f"i{expected}"
            for order in waiting:
                passed[order] += order < expected
        assert len(queue) == len(waiting) and bool(queue) == bool(waiting)
        groups = set(waiting.values())
        assert {group for group in GROUPS if queue.has(group)} == groups
        assert queue.only_group == (tuple(groups) if len(groups) == 1 else ())
        if waiting:
            oldest = min(waiting)
            assert queue.oldest()[:2] == (oldest, waiting[oldest])
            assert queue.oldest()[2] >= passed[oldest], "it must count every item that was served before it"


def test_items_served_in_order_pass_over_none():
    queue = FairQueue()
    for n in range(5):
        queue.push(f"i{n}", n, "a")
    for n in range(5):
        assert queue.oldest() == (n, "a", 0)
        queue.pop("a")


def test_younger_items_of_another_group_pass_over_the_oldest():
    queue = FairQueue()
    queue.push("lone", 0, "b")
    for n in range(1, 5):
        queue.push(f"i{n}", n, "a")
        queue.pop("a")
        assert queue.oldest() == (0, "b", n)


def test_an_item_that_comes_back_is_the_oldest_again():
    queue = FairQueue()
    queue.push("i0", 0, "a")
    queue.push("i1", 1, "a")
    queue.pop("a")
    queue.push("i2", 2, "b")
    queue.push("i0", 0, "a")
    assert queue.oldest() == (0, "a", 0)
    assert [queue.pop("a"), queue.pop("a"), queue.pop("b")] == ["i0", "i1", "i2"]
