"""Gangs of two ranks through Ray, on cards of their own: clips at the released widths and the HQ size, with 8 layers.

A replica serves both stages in turns, so every clip switches the LoRA on the ranks' shards.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ltx_ray.config import ModelFiles, RequestedNumerics
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options
from scripts.bench.random_model import write_model
from tests.support.local_cluster import Dataset, Driver, wait_for
from tests.support.samples import write_jsonl

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
LAYOUTS: dict[str, dict[str, int]] = {
    "one card": {},
    "tp": {"tp": 2},
    "sequence": {"stage1_sequence_parallel": 2, "sequence_parallel": 2},
    "guidance": {"guidance_parallel": 2, "sequence_parallel": 2},
}
ROWS = [{"id": "a", "prompt": "a red boat", "seed": 1}]
#: A rank that fails must not be waited for any longer.
_SECONDS_TO_LOSE_A_GANG = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    return write_model(tmp_path_factory.mktemp("model"), layers=8, gemma_layers=2, connector_layers=2)


class Run:
    """A run of ROWS in a layout."""

    def __init__(self, folder: Path, files: dict[str, str], layout: dict[str, int], **numerics: Any):
        folder.mkdir()
        self.dataset = Dataset(folder / "out")
        options = Options(
            write_jsonl(folder / "rows.jsonl", ROWS),
            str(folder / "out"),
            ModelFiles(**files),
            RequestedNumerics(**numerics),
            parallel=ParallelConfig(stage1=1, stage2=0, **layout),
            save_latents=True,
        )
        self.driver = Driver(options, folder / "driver")

    def ends(self) -> dict[str, torch.Tensor]:
        """The latents of its clip, on success."""
        self.driver.ends(0, seconds=240)
        assert set(self.dataset.read()) == {"a"}
        (latents,) = (self.dataset.folder / "latents").rglob("*.safetensors")
        return load_file(latents)


@pytest.fixture(scope="module")
def latents(tmp_path_factory, files):
    """Latents by the name of a layout, each rendered once."""
    found: dict[str, dict[str, torch.Tensor]] = {}

    def of(layout: str) -> dict[str, torch.Tensor]:
        if layout not in found:
            numerics = {"compile": "off"} if layout == "plain path" else {}
            run = Run(tmp_path_factory.mktemp("run") / "run", files, LAYOUTS.get(layout, {}), **numerics)
            found[layout] = run.ends()
        return found[layout]

    return of


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 of each latent."""
    assert set(found) == set(expected) and len(expected) == 4
    return {n: float((found[n].float() - x.float()).norm() / x.float().norm()) for n, x in expected.items()}


@pytest.mark.parametrize("layout", ["tp", "sequence", "guidance"])
def test_two_cards_render_the_clip_of_one(latents, layout):
    """As near as one card comes to itself when it rounds elsewhere."""
    floor = distances(latents("plain path"), latents("one card"))
    for name, error in distances(latents(layout), latents("one card")).items():
        assert error <= 1.5 * floor[name], f"{name}: {error:.1e}, {floor[name]:.1e} without the fused path"


@pytest.mark.parametrize("layout", ["tp", "sequence"])
def test_a_rank_that_is_killed_in_a_pass_costs_its_gang_and_no_clip(latents, tmp_path, files, layout):
    expected = latents(layout)
    run = Run(tmp_path / "run", files, LAYOUTS[layout])
    wait_for(lambda: run.dataset.events("call"), "the text", seconds=180)
    gang = wait_for(lambda: run.dataset.gangs("diffusion"), "a gang", seconds=60)[0]
    time.sleep(2)  # Stage 1 takes about 8 s.
    assert not [call for call in run.dataset.events("call") if call["stage"] != "text"]
    killed = gang["ranks"][1]["pid"]
    os.kill(killed, signal.SIGKILL)
    (lost,) = wait_for(lambda: run.dataset.events("gang_lost"), "the end of the gang", seconds=_SECONDS_TO_LOSE_A_GANG)
    assert lost["replica"] == gang["replica"]
    found = run.ends()
    assert len(run.dataset.gangs("diffusion")) == 2
    assert not any(Path(f"/proc/{rank['pid']}").exists() for rank in gang["ranks"])
    assert all(torch.equal(found[name], x) for name, x in expected.items())
