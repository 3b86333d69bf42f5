"""The line on a CUDA device: close to the CPU's result, repeatable, and through Ray on one card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import base
from ltx_ray.engine.decode import DecodeEngine, latents_sha256, named_latents
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.text import TextEngine
from ltx_ray.manifest import RawRow, RowRules, judge
from ltx_ray.plan import RecipeBook
from ltx_ray.records import StageLatents

ROW = {
    "id": "one", "prompt": "a red boat", "height": 128, "width": 192, "num_frames": 17, "seed": 1,
    "num_inference_steps": 4, "video_stg_scale": 0.5, "video_stg_blocks": [1],
}  # fmt: skip


def stages(toy, device: str, dtype: str, noise_device: str = "cpu", output: str = "") -> list[StageLatents]:
    """Both stages of ROW on `device`, in this process; with `output` the clip too."""
    model = ModelFiles(**toy)
    numerics = Numerics(dtype=dtype, noise_device=noise_device, device=device)
    place = base.join(device, 0, 1, None, 60)
    item = RecipeBook(model, numerics).item(judge(RawRow("test", 1, ROW), RowRules(num_layers=4)).request)
    spec = EngineSpec("", model, numerics, output, options={"roles": ("stage1", "stage2")})
    rank = base.Rank(0, 1, place)
    text, diffusion = TextEngine(spec, rank), DiffusionEngine(spec, rank)
    text.load()
    diffusion.load()
    contexts = text.run("text", item)
    first = diffusion.run("stage1", item, contexts)
    second = diffusion.run("stage2", item, contexts, first)
    if output:
        decode = DecodeEngine(spec, rank)
        decode.load()
        clip = decode.run("decode", item, first, second)
        assert (Path(output) / clip.path).stat().st_size > 1000
        assert clip.flags == ()
    return [first, second]


def test_float32_agrees_with_the_cpu(toy):
    on_cpu = named_latents(*stages(toy, "cpu", "float32"))
    on_gpu = named_latents(*stages(toy, "cuda", "float32"))
    for name, expected in on_cpu.items():
        error = (on_gpu[name] - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("noise_device", ["cpu", "model"])
def test_bfloat16_is_repeatable_and_near_float32(toy, tmp_path, noise_device):
    first = named_latents(*stages(toy, "cuda", "bfloat16", noise_device, output=str(tmp_path)))
    again = named_latents(*stages(toy, "cuda", "bfloat16", noise_device))
    assert latents_sha256(first) == latents_sha256(again)
    if noise_device == "cpu":
        reference = named_latents(*stages(toy, "cpu", "bfloat16"))
        for name, expected in reference.items():
            error = (first[name].float() - expected.float()).norm() / expected.float().norm()
            assert error <= 0.15, f"{name}: {error:.1e}"


def test_stage_2_continues_the_cuda_generator(toy):
    """The ledger names the device model, and a fresh process state gives the same second stage."""
    first, second = stages(toy, "cuda", "bfloat16", "model")
    assert first.ledger.device == "cuda" and first.ledger.device_model == torch.cuda.get_device_name(0)
    assert [name for name, *_ in second.ledger.draws] == [
        "stage_1.video", "stage_1.audio", "stage_2.video", "stage_2.audio",
    ]  # fmt: skip
    torch.cuda.manual_seed_all(123)
    assert latents_sha256(named_latents(*stages(toy, "cuda", "bfloat16", "model"))) == latents_sha256(
        named_latents(first, second)
    )


def test_two_cards_agree_with_one_over_nccl(toy, tmp_path):
    pytest.importorskip("ray")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from ltx_ray.pools.pool import Wanted
    from ltx_ray.run import Options, render

    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps(ROW) + "\n")
    found = {}
    for tp in (1, 2):
        out = tmp_path / f"tp{tp}"
        wanted = Wanted(tp=tp, stage1=1, stage2=0)
        options = Options(
            str(manifest), str(out), ModelFiles(**toy), dtype="float32", wanted=wanted, save_latents=True
        )
        assert render(options) == 0
        found[tp] = load_file(next((out / "latents").rglob("*.safetensors")))
    for name, expected in found[1].items():
        error = (found[2][name] - expected).norm() / expected.norm()
        assert error <= 1e-5, f"{name}: {error:.1e}"


def test_one_card_serves_all_pools_through_ray(toy, tmp_path):
    pytest.importorskip("ray")
    from ltx_ray.run import Options, render

    rows = [{**ROW, "id": f"r{n}", "seed": n} for n in range(3)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(str(manifest), str(tmp_path / "out"), ModelFiles(**toy))
    assert render(options) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["device"] == "cuda"
    if torch.cuda.device_count() == 1:
        assert run["pools"] == {"text": 1, "diffusion": 1, "decode": 1}
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    devices = {e["role"]: e["ranks"][0]["device"] for e in events if e["event"] == "gang_started"}
    assert set(devices.values()) == {"cuda:0"}
