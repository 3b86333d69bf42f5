"""jobs/example.jsonl: eight scenes of the miniature's world that show all of it, and one row that is refused."""

import json
from pathlib import Path

import pytest

from ltx_ray.miniature import world
from ltx_ray.shapes import SIZE_MULTIPLE

EXAMPLE = Path(__file__).resolve().parents[3] / "jobs" / "example.jsonl"


@pytest.fixture(scope="module")
def scenes():
    """Prompt -> scene of every prompt of the world."""
    return {
        prompt: scene
        for split in world.SPLITS
        for scene in world.scenes(split)
        for phrasings in world.SPLITS
        for prompt in world.prompts(scene, phrasings)
    }


def test_the_example_shows_the_whole_world_and_one_row_that_is_refused(scenes):
    rows = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    legal = [row for row in rows if row["width"] % SIZE_MULTIPLE == 0]
    assert (len(legal), len(rows)) == (8, 9)
    shown = [scenes[row["prompt"]] for row in legal]
    for field, values in (
        ("shape", world.SHAPES), ("colour", world.COLOURS), ("motion", world.MOTIONS), ("ground", world.COLOURS),
        ("sound", world.SOUNDS),
    ):  # fmt: skip
        assert {getattr(scene, field) for scene in shown} == set(values), field
    assert rows[-1]["id"] == "too-narrow"
