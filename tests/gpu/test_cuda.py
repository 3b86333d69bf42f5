"""The pipeline on a CUDA device: close to the CPU's result, repeatable, and through Ray on one card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ltx_ray.checkpoints.checkpoint import open_checkpoint
from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, RequestedNumerics
from ltx_ray.engine import base
from ltx_ray.engine.decode import DecodeEngine, latents_sha256, named_latents
from ltx_ray.engine.diffusion import DiffusionEngine
from ltx_ray.engine.text import TextEngine
from ltx_ray.manifest.reader import RawRow
from ltx_ray.manifest.rules import LegalRow, RowRules, judge
from ltx_ray.placement.numerics import has_fa3, resolve
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.planning.plan import ItemBuilder
from ltx_ray.presets import served_pipelines
from ltx_ray.records import StageLatents, WorkItem
from ltx_ray.stages import DIFFUSION_STAGES, Stage
from ltx_ray.toy import ToyShape, make_toy_model

DEVICE = "cuda"
GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
ROW = {
    "id": "one", "prompt": "a red boat", "height": 128, "width": 192, "num_frames": 17, "seed": 1,
    "num_inference_steps": 4, "video_stg_scale": 0.5, "video_stg_blocks": [1],
}  # fmt: skip
BASE = {**ROW, "pipeline": "base", "audio_stg_scale": 0.5, "audio_stg_blocks": [2]}
DISTILLED = {name: ROW[name] for name in ("id", "prompt", "height", "width", "num_frames", "seed")}
FIRST = {"path": "a.png", "strength": 0.9}
LATER = {"path": "b.jpg", "frame_idx": 9, "strength": 0.7}
CASES = {
    "hq-text": ROW,
    "hq-image": {**ROW, "images": [FIRST]},
    "hq-keyframes": {**ROW, "images": [FIRST, LATER]},
    "base-text": BASE,
    "base-image": {**BASE, "images": [FIRST]},
    "base-keyframes": {**BASE, "images": [FIRST, LATER]},
    "distilled-text": {**DISTILLED, "pipeline": "distilled"},
    "distilled-image": {**DISTILLED, "pipeline": "distilled", "images": [FIRST]},
    "distilled-keyframes": {**DISTILLED, "pipeline": "distilled", "images": [FIRST, LATER]},
}
#: Relative L2 of bfloat16 against float32 on a CPU, in stage 1 and in stage 2, of the reference and of ours.
BF16_FLOOR = {"stage_1": 5e-2, "stage_2": 1e-2}


class Engines:
    """Text and diffusion of one model on one device, in this process."""

    def __init__(
        self,
        toy,
        device: str,
        dtype: str,
        noise_device: str = "cpu",
        distilled: bool = False,
        precision: str = "bf16",
        attention: str = "auto",
        compiled: str = "auto",
    ):
        files = {**toy, "distilled_lora": None} if distilled else toy
        self.model = ModelFiles(**files, distilled=distilled)
        asked = RequestedNumerics(
            dtype=dtype, noise_device=noise_device, precision=precision, attention=attention, compile=compiled
        )
        transformer = open_checkpoint(files["checkpoint_path"]).transformer
        self.numerics = resolve(asked, ParallelConfig(), device, (), False, transformer)
        self.rank = base.Rank(0, 1, base.join_gang(device, 0, 1, None, 60))
        self.text, self.diffusion = TextEngine(self.spec(), self.rank), DiffusionEngine(self.spec(), self.rank)
        self.text.load()
        self.diffusion.load()

    def spec(self, output: str = "") -> EngineSpec:
        return EngineSpec("", self.model, self.numerics, output, layout=GangLayout(DIFFUSION_STAGES, alternates=True))

    def item(self, row: dict) -> WorkItem:
        """The item of a manifest row."""
        rules = RowRules(num_layers=4, pipelines=served_pipelines(self.model.distilled))
        judged = judge(RawRow(str(GOLDENS / "rows.jsonl"), 1, row), rules)
        assert isinstance(judged, LegalRow), judged.messages()
        return ItemBuilder(self.model, self.numerics).item(judged.request)

    def stages(self, row: dict, output: str = "") -> list[StageLatents]:
        """Both stages of `row`, and its clip when there is an `output`."""
        item = self.item(row)
        contexts = self.text.run("text", item)
        first = self.diffusion.run("stage1", item, contexts)
        second = self.diffusion.run("stage2", item, contexts, first)
        if output:
            decode = DecodeEngine(self.spec(output), self.rank)
            decode.load()
            clip = decode.run("decode", item, first, second)
            assert (Path(output) / clip.path).stat().st_size > 1000
            assert clip.flags == ()
        return [first, second]


def stages(toy, device: str, dtype: str, noise_device: str = "cpu", output: str = "") -> list[StageLatents]:
    """Both stages of ROW on new engines."""
    return Engines(toy, device, dtype, noise_device).stages(ROW, output)


@pytest.fixture(scope="module")
def latents(toy):
    """Latents by name of a case, on engines that the module shares. Those on a CPU are computed once."""
    engines, on_cpu = {}, {}

    def run(case: str, device: str, dtype: str) -> dict[str, torch.Tensor]:
        key = (device, dtype, case.startswith("distilled"))
        if device == "cpu" and (case, dtype) in on_cpu:
            return on_cpu[case, dtype]
        if key not in engines:
            engines[key] = Engines(toy, device, dtype, distilled=key[-1])
        found = named_latents(*engines[key].stages(CASES[case]))
        if device == "cpu":
            on_cpu[case, dtype] = found
        return found

    return run


def distances(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative L2 of each latent."""
    assert set(found) == set(expected) == {"stage_1.video", "stage_1.audio", "stage_2.video", "stage_2.audio"}
    return {n: float((found[n].float() - x.float()).norm() / x.float().norm()) for n, x in expected.items()}


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_with_the_cpu(latents, case):
    on_gpu = latents(case, DEVICE, "float32")
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in on_gpu.values())
    for name, error in distances(on_gpu, latents(case, "cpu", "float32")).items():
        assert error <= 1e-4, f"{name}: {error:.1e}"


def bf16_noise_is_rounded_float32_noise() -> bool:
    """Whether this torch draws the same numbers on a CPU in both dtypes (2.13 does, 2.11 does not)."""
    drawn = [
        torch.randn(4096, dtype=d, generator=torch.Generator().manual_seed(1)) for d in (torch.bfloat16, torch.float32)
    ]
    return bool(torch.equal(drawn[0], drawn[1].bfloat16()))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_repeatable_and_within_its_noise_floor(latents, case):
    """From float32 where both dtypes draw the same noise, otherwise twice that from a CPU in bfloat16."""
    first, again = (latents(case, DEVICE, "bfloat16") for _ in range(2))
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in first.values())
    assert latents_sha256(first) == latents_sha256(again)
    dtype, slack = ("float32", 1.5) if bf16_noise_is_rounded_float32_noise() else ("bfloat16", 3.0)
    for name, error in distances(first, latents(case, "cpu", dtype)).items():
        floor = BF16_FLOOR[name.partition(".")[0]]
        assert error <= floor * slack, f"{name}: {error:.1e}"


def test_fp8_is_repeatable_and_near_bf16(toy, latents):
    """Over both stages and a switch of the LoRA, and not equal to bf16."""
    engines = Engines(toy, DEVICE, "bfloat16", precision="fp8")
    first, again = (named_latents(*engines.stages(ROW)) for _ in range(2))
    assert latents_sha256(first) == latents_sha256(again)
    for name, error in distances(first, latents("hq-text", DEVICE, "bfloat16")).items():
        assert 1e-3 <= error <= 0.5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("attention", ["cudnn", "flash", "sdpa", *(["fa3"] if has_fa3() else [])])
@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
def test_a_clip_of_one_frame(toy, attention, size, tmp_path):
    """Its sound is one latent, which is a single key, and at 64x64 its picture is one token in stage 1."""
    row = {**ROW, "num_frames": 1, "height": size[0], "width": size[1]}
    found = named_latents(*Engines(toy, DEVICE, "bfloat16", attention=attention).stages(row, str(tmp_path)))
    expected = named_latents(*Engines(toy, "cpu", "bfloat16").stages(row))
    assert found["stage_1.audio"].shape == (1, 8, 1, 16)
    for name, error in distances(found, expected).items():
        assert error <= 0.3, f"{name}: {error:.1e}"  # An upsampler that sees one token makes differences much larger.


@pytest.mark.parametrize(
    ("attention", "compiled"), [("auto", "auto"), ("auto", "fused"), ("flash", "fused"), ("sdpa", "off")]
)
@pytest.mark.parametrize("widths", [(3, 24, 8), (1, 62, 10), (8, 62, 10)])
def test_other_widths(tmp_path, widths, attention, compiled):
    """Whole clips, where auto decides and where a user insists."""
    heads, head_dim, audio_head_dim = widths
    shape = ToyShape(layers=3, heads=heads, head_dim=head_dim, audio_head_dim=audio_head_dim)
    files, row = make_toy_model(tmp_path, seed=1, shape=shape), {**ROW, "video_stg_blocks": [1]}
    found = named_latents(*Engines(files, DEVICE, "bfloat16", attention=attention, compiled=compiled).stages(row))
    plain, fused = (
        named_latents(*Engines(files, "cpu", "bfloat16", compiled=path).stages(row)) for path in ("off", "fused")
    )
    # A sound of ten channels is up to ten times as sensitive to rounding as the toy's.
    own = distances(fused, plain)
    for name, error in distances(found, plain).items():
        assert error <= max(BF16_FLOOR[name.partition(".")[0]] * 3, own[name] * 2), f"{name}: {error:.1e}"


@pytest.mark.parametrize("compiled", ["off", "fused"])
def test_other_widths_in_float32_agree_with_the_cpu(tmp_path, compiled):
    """The model of other widths of tests/parity, against a CPU."""
    with safe_open(GOLDENS / "widths" / "base.safetensors", "pt") as file:
        shape = ToyShape(**json.loads(file.metadata()["shape"]))
    files = make_toy_model(tmp_path, seed=1, shape=shape)
    layers = {**ROW, "video_stg_blocks": [0]}
    on_gpu, on_cpu = (
        named_latents(*Engines(files, device, "float32", compiled=path).stages(layers))
        for device, path in ((DEVICE, compiled), ("cpu", "off"))
    )
    assert max(distances(on_gpu, on_cpu).values()) <= 1e-4


@pytest.mark.parametrize("noise_device", ["cpu", "model"])
def test_new_engines_give_the_same_bits_and_a_clip(toy, tmp_path, noise_device):
    first = named_latents(*stages(toy, DEVICE, "bfloat16", noise_device, output=str(tmp_path)))
    again = named_latents(*stages(toy, DEVICE, "bfloat16", noise_device))
    assert latents_sha256(first) == latents_sha256(again)


def test_stage_2_continues_the_cuda_generator(toy):
    """The ledger names the GPU model, and stage 2 does not depend on the process's own generator."""
    first, second = stages(toy, "cuda", "bfloat16", "model")
    assert first.ledger.device == "cuda" and first.ledger.device_model == torch.cuda.get_device_name(0)
    assert [name for name, *_ in second.ledger.draws] == [
        "stage_1.video", "stage_1.audio", "stage_2.video", "stage_2.audio",
    ]  # fmt: skip
    torch.cuda.manual_seed_all(123)
    assert latents_sha256(named_latents(*stages(toy, "cuda", "bfloat16", "model"))) == latents_sha256(
        named_latents(first, second)
    )


def test_noise_of_a_cpu_is_drawn_on_a_cpu(toy):
    """Stage 2 on a GPU after stage 1 on a CPU, although the GPU draws the noise of its own rows."""
    cpu, gpu = Engines(toy, "cpu", "float32"), Engines(toy, "cuda", "float32", "model")
    item = cpu.item(ROW)
    contexts = cpu.text.run("text", item)
    first = cpu.diffusion.run("stage1", item, contexts)
    found, expected = (e.diffusion.run("stage2", item, contexts, first) for e in (gpu, cpu))
    assert found.ledger == expected.ledger
    for name, error in distances(named_latents(first, found), named_latents(first, expected)).items():
        assert error <= 1e-4, f"{name}: {error:.1e}"


def test_two_cards_agree_with_one_over_nccl(toy, tmp_path):
    pytest.importorskip("ray")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    from ltx_ray.run import Options, render

    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps(ROW) + "\n")
    layouts = {"one": {}, "tp": {"tp": 2}, "parallel": {"guidance_parallel": 2, "sequence_parallel": 2}}
    found = {}
    for name, layout in layouts.items():
        out = tmp_path / name
        options = Options(
            str(manifest),
            str(out),
            ModelFiles(**toy),
            RequestedNumerics(dtype="float32"),
            parallel=ParallelConfig(stage1=1, stage2=0, **layout),
            save_latents=True,
        )
        assert render(options) == 0
        found[name] = load_file(next((out / "latents").rglob("*.safetensors")))
    for layout in ("tp", "parallel"):
        for name, error in distances(found[layout], found["one"]).items():
            assert error <= 1e-5, f"{layout} {name}: {error:.1e}"


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


def test_replicas_of_one_stage_and_those_that_seldom_switch_give_the_same_bits(toy):
    """They cache no sources when they are loaded, but at their first switch."""
    engines = Engines(toy, DEVICE, "bfloat16", noise_device="model")
    expected = latents_sha256(named_latents(*engines.stages(ROW)))

    def engine(*roles: Stage) -> DiffusionEngine:
        spec = EngineSpec("", engines.model, engines.numerics, "", layout=GangLayout(roles))
        made = DiffusionEngine(spec, engines.rank)
        made.load()
        return made

    item = engines.item(ROW)
    contexts = engines.text.run("text", item)
    for first, second in ((engine("stage1"), engine("stage2")), (engine("stage1", "stage2"),) * 2):
        for _ in range(2):
            latents = first.run("stage1", item, contexts)
            after = second.run("stage2", item, contexts, latents)
            assert latents_sha256(named_latents(latents, after)) == expected
