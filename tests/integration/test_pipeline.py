"""The whole pipeline on real Ray with the toy model: latents do not depend on how they were computed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_ray.config import EngineSpec, GangLayout, LoraSpec, ModelFiles, Numerics, Selection
from ltx_ray.dataset.selection import chosen_items, parse_filter
from ltx_ray.engine.base import Rank
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.latents import latents_sha256, named_latents
from ltx_ray.engine.text import TextEngine
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import RowRules, judge
from ltx_ray.planning.plan import ItemBuilder
from ltx_ray.records import AV, NoiseLedger, StageLatents
from ltx_ray.stages import Stage
from ltx_ray.storage.store import Store
from tests.support.pipeline import ToyPipeline
from tests.support.runner import rows_by_id

ROWS = [
    {"id": "wide", "prompt": "a red boat", "height": 64, "width": 128, "num_frames": 9, "seed": 1},
    {"id": "tall", "prompt": "a bird", "height": 128, "width": 64, "num_frames": 17, "frame_rate": 29.97, "seed": 2},
    {
        "id": "image", "prompt": "a tree", "height": 64, "width": 64, "num_frames": 9, "seed": 4,
        "images": [{"path": "a.png", "strength": 0.9}, {"path": "a.png", "frame_idx": 8}],
    },
    {"id": "plain", "prompt": "雪", "negative_prompt": "", "height": 64, "width": 64, "num_frames": 9, "seed": 3},
]  # fmt: skip
ROWS = [{**row, "num_inference_steps": 3} for row in ROWS]


@pytest.fixture(scope="module")
def split(cluster, tmp_path_factory):
    """The rows in float32, with stage 1 and stage 2 in pools of one rank each, and with saved latents."""
    from tests.support.runner import Runner

    runner = Runner(cluster, tmp_path_factory.mktemp("split"))
    shutil.copy(Path(__file__).parents[1] / "parity" / "goldens" / "a.png", runner.folder)
    assert runner.render(ROWS, fake=False, dtype="float32", save_latents=True, stage1=1, stage2=1) == 0
    return runner


def hashes(index: dict[str, dict]) -> dict[str, str]:
    return {name: row["latents_sha256"] for name, row in index.items()}


def latents(runner, row: dict, output=None) -> dict[str, torch.Tensor]:
    return load_file((output or runner.output) / "latents" / row["item_id"][:2] / f"{row['item_id']}.safetensors")


def test_clips_have_picture_and_sound_of_the_right_length(split):
    index = split.index()
    assert set(index) == {"wide", "tall", "plain", "image"}
    for row, source in ((index[r["id"]], r) for r in ROWS):
        with av.open(str(split.output / row["clip"])) as clip:
            video, audio = clip.streams.video[0], clip.streams.audio[0]
            frames = [f.to_ndarray(format="gray") for f in clip.decode(video)]
            assert len(frames) == source["num_frames"]
            assert frames[0].shape == (source["height"], source["width"])
            assert clip.metadata["item_id"] == row["item_id"]
            expected = source["num_frames"] / (30000 / 1001 if row["frame_rate"] == 29.97 else 24)
            assert abs(float(video.duration * video.time_base) - expected) < 1e-3
            assert abs(float(audio.duration * audio.time_base) - expected) < 1.5 / 48000
            assert np.std(np.stack(frames)) > 2
        with av.open(str(split.output / row["clip"])) as clip:
            sound = np.concatenate([f.to_ndarray() for f in clip.decode(audio=0)], axis=1)
            assert 0.01 < np.abs(sound).max() <= 1.0
        assert row["flags"] == []
        assert row["audio_stage"] == "stage_1"


def test_latents_hash_is_of_the_stored_latents(split):
    for row in split.index().values():
        stored = latents(split, row)
        named = {n: stored[n] for n in ("stage_1.video", "stage_1.audio", "stage_2.video", "stage_2.audio")}
        assert latents_sha256(named) == row["latents_sha256"]
        assert stored["stage_1.video"].dtype == torch.float32


def test_same_latents_in_other_pools_in_another_order_and_after_a_resume(split, tmp_path):
    """The last row in a pool for both stages, then the others through two replicas of stage 1."""
    output = tmp_path / "out"
    manifest = split.manifest(ROWS[::-1], name="reversed.jsonl")
    options = {"fake": False, "dtype": "float32"}
    assert split.render(manifest, output, selection=Selection(limit=1), stage1=1, stage2=0, **options) == 0
    assert set(split.index(output)) == {ROWS[-1]["id"]}
    assert split.render(manifest, output, stage1=2, stage2=1, **options) == 0
    calls = [e["id"] for e in split.events(output) if e["event"] == "call" and e["stage"] == "stage1"]
    assert sorted(calls) == sorted(row["id"] for row in ROWS[:-1])
    assert hashes(split.index(output)) == hashes(split.index())


def test_previews_are_promoted_to_the_clips_of_an_uninterrupted_run(split, tmp_path):
    """One run renders previews and another finishes the chosen rows: the same bits, without rendering stage 1 again."""
    output = tmp_path / "out"
    options = {"fake": False, "dtype": "float32"}
    manifest = split.manifest(ROWS[:3], name="trial.jsonl")
    assert split.render(manifest, output, stop_after="stage1", stage1=1, **options) == 0
    assert not (output / "index").exists()
    previews = rows_by_id(output / "previews")
    assert set(previews) == {"wide", "tall", "image"}
    with av.open(str(output / previews["tall"]["clip"])) as clip:
        video = clip.streams.video[0]
        assert (video.width, video.height, len(list(clip.decode(video)))) == (32, 64, 17)
    # The same command finds nothing to do.
    assert split.render(manifest, output, stop_after="stage1", stage1=1, **options) == 0
    assert not [e for e in split.events(output) if e["event"] == "call"]

    def promote(*conditions: str, **changed) -> int:
        items = chosen_items(Store(str(output)), None, map(parse_filter, conditions))
        requested = {"promote": frozenset(items.values()), "selection": Selection(ids=frozenset(items))}
        return split.render(str(output / "previews"), output, stage1=1, stage2=0, **{**options, **requested, **changed})

    assert promote("id ~ a", "num_frames < 18") == 0
    assert {e["stage"] for e in split.events(output) if e["event"] == "call"} == {
        "text",
        "load_latents",
        "stage2",
        "decode",
    }
    whole = hashes(split.index())
    assert hashes(split.index(output)) == {name: whole[name] for name in ("image", "tall")}

    # Another recipe would give another clip, so it is refused.
    assert promote("id = wide", dtype="bfloat16") == 3
    assert "that its preview was made with" in split.failed(output)["wide"]["message"]


def test_tensor_parallel_latents_agree(split, tmp_path):
    output = tmp_path / "out"
    row = split.manifest(ROWS[:1], name="one.jsonl")
    assert split.render(row, output, fake=False, dtype="float32", save_latents=True, tp=2, stage1=1, stage2=0) == 0
    ours, whole = (latents(split, split.index(o)["wide"], o) for o in (output, split.output))
    for name in whole:
        error = (ours[name] - whole[name]).norm() / whole[name].norm()
        assert error <= 1e-5, f"{name}: {error:.1e}"
    started = [e for e in split.events(output) if e["event"] == "gang_started" and e["role"] == "diffusion"]
    assert [r["rank"] for r in started[0]["ranks"]] == list(range(2))
    assert len({r["pid"] for r in started[0]["ranks"]}) == 2


def test_stage_2_alone_gives_the_same_bits(split, toy):
    """From the stored stage-1 latents and the ledger, in another process than the one that computed them."""
    row = split.index()["tall"]
    model = ModelFiles(**toy)
    numerics = Numerics(dtype="float32")
    request = judge(RawRow("test", 1, ROWS[1]), RowRules()).request
    item = ItemBuilder(model, numerics).item(request)
    assert item.item_id == row["item_id"]
    spec = EngineSpec("", model, numerics, str(split.output), layout=GangLayout((Stage.STAGE2,)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        text, diffusion = TextEngine(spec, Rank()), DiffusionEngine(spec, Rank())
        text.load()
        diffusion.load()
        stored = latents(split, row)
        ledger = NoiseLedger(
            seed=2,
            device="cpu",
            device_model="cpu",
            draws=(
                ("stage_1.video", (1, stored["stage_1.video"][0, 0].numel(), 128), "float32"),
                ("stage_1.audio", (1, stored["stage_1.audio"].shape[2], 128), "float32"),
            ),
        )
        first = StageLatents(AV(stored["stage_1.video"], stored["stage_1.audio"]), ledger)
        second = diffusion.run("stage2", item, text.run("text", item), first)
    finally:
        torch.set_num_threads(threads)
    assert latents_sha256(named_latents(first, second)) == row["latents_sha256"]


def test_lora_sets_of_rows(cluster, tmp_path, toy):
    """Rows with their own LoRAs and strengths on one replica have the latents of a fresh load, with few switches."""
    from tests.support.runner import Runner

    factors = load_file(toy["distilled_lora"])
    files = []
    for name, part in (("style", "attn1"), ("camera", "ff.")):  # In ComfyUI's spelling, with an alpha.
        path, renamed = tmp_path / f"{name}.safetensors", {}
        for key, tensor in factors.items():
            if part in key:
                renamed[key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = tensor.flip(0).contiguous()
                renamed[key.rpartition(".lora_")[0] + ".alpha"] = torch.tensor(4.0)
        save_file(renamed, path)
        files.append(LoraSpec(name, str(path), 1.0))
    model = replace(ModelFiles(**toy), loras=tuple(files))
    small = {"prompt": "a boat", "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}
    sets = [
        [], [{"name": "style", "strength": 0.7}], [{"name": "camera", "strength": 1.0}, {"name": "style"}],
    ]  # fmt: skip
    rows = [{**small, "id": f"r{n}", "seed": n, "loras": sets[n % 3]} for n in range(4)]
    runner = Runner(cluster, tmp_path)
    assert runner.render(rows, fake=False, dtype="float32", model=model, stage1=1, stage2=0) == 0
    index = runner.index()
    used = [[(use["name"], use["strength"]) for use in index[f"r{n}"]["loras"]] for n in range(3)]
    assert used == [[], [("style", 0.7)], [("style", 1.0), ("camera", 1.0)]]
    assert len(set(hashes(index).values())) == 4
    # Each stage of each set once makes 6 merges, the first of which belongs to loading.
    assert sum(event["event"] == "switch" for event in runner.events()) <= 7
    # On weights into which nothing else was ever merged.
    fresh = ToyPipeline(model, dtype="float32")
    assert latents_sha256(fresh.latents(rows[2])) == index["r2"]["latents_sha256"]
