"""What holds for unit tests."""

from __future__ import annotations

import os

import pytest

from ltx_ray.config import ModelFiles, Numerics
from ltx_ray.planning.plan import ItemBuilder


@pytest.fixture(scope="module", autouse=True)
def _nothing_waits_for_the_disk():
    """No test cuts the power, and a busy disk takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def builder(toy) -> ItemBuilder:
    """Recipes of the toy model."""
    return ItemBuilder(ModelFiles(**toy), Numerics())
