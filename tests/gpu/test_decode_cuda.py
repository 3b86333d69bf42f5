"""Decoding on a card: when memory does not suffice for the reference's tiles, and in fused steps."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from contextlib import contextmanager
from pathlib import Path

import av
import pytest
import torch

from ltx_ray.config import EngineSpec, ModelFiles, Numerics
from ltx_ray.engine import base, components, decode_steps
from ltx_ray.engine.decode import DecodeEngine
from ltx_ray.engine.decode_steps import ConvSum, SumOutputs
from ltx_ray.engine.frames import PictureCheck
from ltx_ray.engine.fused_decoder import fuse_decoder
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import NoiseLedger, StageLatents, WorkItem
from tests.support.decoders import small_decoder
from tests.support.moving_pictures import i420, scene
from tests.support.samples import recipe, request

LAYOUTS = (torch.channels_last_3d, torch.contiguous_format)
#: Relative error of the kernel against the same arithmetic in float32, rounded once at the end.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-3}


@contextmanager
def memory(nbytes: float):
    """Limit the memory of the card to `nbytes`."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def engine(toy, tmp_path):
    spec = EngineSpec("", ModelFiles(**toy), Numerics(dtype="bfloat16", device="cuda", compile="fused"), str(tmp_path))
    engine = DecodeEngine(spec, base.Rank(0, 1, base.join_gang("cuda", 0, 1, None, 60)))
    engine.load()
    return engine


def clip_of(number: int, **size: int) -> tuple[WorkItem, list[StageLatents]]:
    item = WorkItem(f"{number:032x}", request(seed=number, frame_rate=200.0, **size), recipe(), "r" * 16)
    generator = torch.Generator().manual_seed(number)
    shapes = item.request.shape.half(), item.request.shape
    latents = (latent_sizes(s).map(lambda size: torch.randn(size, generator=generator).bfloat16()) for s in shapes)
    return item, [StageLatents(pair, NoiseLedger(number, "cpu", "cpu")) for pair in latents]


def frames(engine: DecodeEngine, path: str) -> int:
    with av.open(str(Path(engine.spec.output) / path)) as clip:
        return sum(1 for _ in clip.decode(video=0))


def test_smaller_tiles_where_the_references_do_not_fit(engine):
    item, stages = clip_of(1, height=704, width=1280, num_frames=121)
    small, small_stages = clip_of(2, height=128, width=192, num_frames=17)
    engine.run("decode", small, *small_stages)  # Libraries have allocated their workspaces now.
    gc.collect()
    torch.cuda.empty_cache()
    # The limit is on what is reserved, and what earlier tests left lies scattered over what is.
    idle = torch.cuda.memory_reserved()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    clip = engine.run("decode", item, *stages)
    assert clip.flags == () and engine.facts.decode_rung == 0
    needed = torch.cuda.max_memory_allocated() - before
    rungs = []
    for share in (0.8, 0.5):
        with memory(idle + share * needed):
            clip = engine.run("decode", item, *stages)
            rungs.append(engine.facts.decode_rung)
            assert clip.flags == ("tiled_smaller",) and frames(engine, clip.path) == 121
            assert engine.run("decode", small, *small_stages).flags == ()
    assert 0 < rungs[0] < rungs[1], "less memory, smaller tiles"
    # With all of the card's memory again, it starts at the rung that sufficed.
    engine.run("decode", item, *stages)
    assert engine.facts.decode_rung == rungs[1]


def test_when_nothing_fits_the_error_is_raised_and_memory_is_freed(engine):
    item, stages = clip_of(1, height=704, width=1280, num_frames=121)
    small, small_stages = clip_of(2, height=128, width=192, num_frames=17)
    engine.run("decode", small, *small_stages)  # Libraries have allocated their workspaces now.
    before = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    with memory(torch.cuda.memory_reserved() + 2**27):
        with pytest.raises(torch.OutOfMemoryError, match="in the smallest tiles"):
            engine.run("decode", item, *stages)
        assert torch.cuda.memory_allocated() <= before
    assert engine.run("decode", item, *stages).flags == ()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["last", "first"])
@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("channels", [3, 128])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 7, 9)])
def test_decode_kernel(size, channels, factors, layout, dtype):
    from ltx_ray.engine import decode_kernels

    rng = torch.Generator("cuda").manual_seed(0)
    expansion = factors[0] * factors[1] * factors[2]

    def normal(channels: int) -> torch.Tensor:
        x = torch.randn((size[0], channels, *size[1:]), generator=rng, device="cuda").to(dtype)
        return x.contiguous(memory_format=layout)

    bias = torch.randn(channels * expansion, generator=rng, device="cuda").to(dtype)
    for add, outputs, width_first in (
        (True, SumOutputs(layout, layout, (1, 1), 1e-8), False),
        (False, SumOutputs(layout, layout, (1, 1), 1e-8), False),
        (False, SumOutputs(layout, None, (2, 0), 1e-8), False),
        (False, SumOutputs(layout, None, (1, 1)), False),
        (False, SumOutputs(layout, torch.contiguous_format), True),
    ):
        y, x = normal(channels * expansion), normal(channels) if add and expansion == 1 else None
        expected = decode_steps.finish_sum(ConvSum(y, bias, x, factors, width_first), outputs)
        given = [
            ConvSum(y.clone(), bias, x, factors, width_first) for _ in range(2)
        ]  # The kernel may write the sum into y.
        first, second = (decode_kernels.finish_sum(total, outputs) for total in given)
        for e, a, b in zip(expected, first, second, strict=True):
            assert (e is None) == (a is None)
            if e is not None:
                assert a.shape == e.shape and a.dtype == e.dtype and torch.equal(a, b)
                assert relative(a, e) < ROUNDING[dtype], (add, outputs)


@pytest.mark.parametrize("kind", ["toy", "random", "narrow"])
def test_fused_pixels_are_no_further_from_exact(kind, toy):
    """Compared with float32 on a CPU, when both run in bfloat16 on the card."""
    if kind == "toy":
        decoder = components.load_video_vae(toy["checkpoint_path"], torch.bfloat16, "cpu").decoder
    else:
        decoder = small_decoder((32, 64, 64, 128) if kind == "random" else (6, 12, 12, 24)).bfloat16()
    exact, plain = copy.deepcopy(decoder).float(), copy.deepcopy(decoder).cuda()
    fused = decoder.cuda()
    assert fuse_decoder(fused)
    pixels: dict[str, list[torch.Tensor]] = {"exact": [], "plain": [], "fused": []}
    with torch.inference_mode():
        for seed, size in enumerate([(1, 1, 1), (3, 4, 5), (2, 7, 3), (4, 6, 6)]):
            latents = torch.randn((1, 128, *size), generator=torch.Generator().manual_seed(seed)).bfloat16()
            pixels["exact"].append(exact(latents.float()).flatten())
            pixels["plain"].append(plain(latents.cuda()).flatten().cpu())
            again = [fused(latents.cuda()) for _ in range(2)]
            assert torch.equal(*again)
            pixels["fused"].append(again[0].flatten().cpu())
    errors = {name: relative(torch.cat(pixels[name]), torch.cat(pixels["exact"])) for name in ("plain", "fused")}
    assert errors["fused"] <= 1.05 * errors["plain"], errors


def test_fused_takes_no_more_memory():
    latents = torch.randn((1, 128, 4, 12, 16), dtype=torch.bfloat16, device="cuda")
    decoder, peaks = small_decoder((64, 128, 128, 256)).bfloat16().cuda(), []
    with torch.inference_mode():
        for fuse in (False, True):
            if fuse:
                assert fuse_decoder(decoder)
            decoder(latents)  # Libraries have allocated their workspaces now.
            idle = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            decoder(latents)
            peaks.append(torch.cuda.max_memory_allocated() - idle)
    assert peaks[1] <= peaks[0], peaks


def test_the_engine_decodes_fused(engine):
    assert "forward" in vars(engine.video_vae.decoder)


def test_measures_are_those_of_a_cpu():
    """Of the same frames, to the last bit. The number of frames ends in a part of a batch."""
    picture = scene(0, 256, 384)
    shots = [torch.roll(picture, 3 * n, 1) + 2 * torch.randn(picture.shape) for n in range(21)]
    frames = i420([*shots, *[scene(1, 256, 384)] * 16])
    checks = []
    for device in ("cpu", "cuda"):
        check = PictureCheck()
        for chunk in frames.to(device).split([9, 17, 11]):
            check.update(chunk)
        checks.append(check)
    assert checks[0].measures() == checks[1].measures() and checks[0].measures().cuts == 1
    assert checks[0].flags() == checks[1].flags()


def test_fused_measures_are_the_plain_ones(engine, toy):
    """To a rounding of bfloat16: the fused decoder is on the card, the plain one too."""
    item, stages = clip_of(3, height=128, width=192, num_frames=49)
    fused = engine.run("decode", item, *stages)
    engine.video_vae = components.load_video_vae(toy["checkpoint_path"], torch.bfloat16, engine.device, part="decoder")
    assert "forward" not in vars(engine.video_vae.decoder)
    plain = engine.run("decode", item, *stages)
    assert fused.flags == plain.flags and fused.sound == plain.sound
    for name, value in dataclasses.asdict(plain.picture).items():
        assert getattr(fused.picture, name) == pytest.approx(value, rel=0.02, abs=0.01), name


def test_measuring_takes_little_of_a_decode():
    """Of 121 frames at 1088x1920, of which a decode takes seconds."""
    frames = torch.randint(16, 236, (121, 1632, 1920), dtype=torch.uint8, device="cuda")
    PictureCheck().update(frames[:16])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    idle, start = torch.cuda.memory_allocated(), time.perf_counter()
    check = PictureCheck()
    for chunk in frames.split(56):
        check.update(chunk)
    assert check.measures().mean_luma > 0
    seconds = time.perf_counter() - start
    assert seconds < 0.3 and torch.cuda.max_memory_allocated() - idle < 2**29, seconds
