"""Schedules, noise, guidance and the sampler's arithmetic. Numbers marked v1.2.0 were printed by the reference."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys

import pytest
import torch

from ltx_ray.records import AV, Guidance, NoiseLedger, WrongDevice
from ltx_ray.sampling import schedule_limits
from ltx_ray.sampling.guidance import GuidedDenoiser, combine, skips
from ltx_ray.sampling.noise import ClipNoise, SamplerNoise, add_noise, check_noise_device
from ltx_ray.sampling.passes import passes_for
from ltx_ray.sampling.res2s import _replace_with_noise, coefficients, sample_res2s
from ltx_ray.sampling.schedule_limits import host_sigmas, is_sampled, most_frames, schedule_shift
from ltx_ray.sampling.sigmas import shifted_sigmas
from ltx_ray.shapes import ClipShape

PLAIN = Guidance(cfg_scale=1.0, stg_scale=0.0, rescale_scale=0.0, modality_scale=1.0, stg_blocks=(), skip_step=0)


def guidance(**changes) -> Guidance:
    return Guidance(**{**PLAIN.__dict__, **changes})


def pair(seed: int, dtype: torch.dtype = torch.float32) -> AV[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return AV(torch.randn(1, 12, 8, generator=rng).to(dtype), torch.randn(1, 5, 6, generator=rng).to(dtype))


def drawn_schedules() -> list[tuple[int, int]]:
    drawn = random.Random(3)
    return [
        (steps, tokens)
        for steps in (2, 3, 4, 7, 15, 30, 31, 50, 99, 1000)
        for tokens in [1, 1024, 8160, 24_500, 36_700, *(drawn.randrange(60_000) for _ in range(30))]
    ]


def test_the_planner_knows_the_schedules_of_the_sampler():
    for steps, tokens in drawn_schedules():
        sigmas = shifted_sigmas(steps, tokens)
        falls = bool(torch.isfinite(sigmas).all() and (sigmas.diff() < 0).all())
        assert is_sampled(steps, tokens) == falls, (steps, tokens)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch.linspace rounds otherwise")
def test_a_schedule_has_the_bits_of_torchs_kernels():
    for steps, tokens in drawn_schedules():
        shift = schedule_shift(tokens)
        even = torch.linspace(1.0, 0.0, steps + 1)
        sigmas = torch.where(even != 0, shift / (shift + (1 / even - 1)), 0)
        complement = 1.0 - sigmas[sigmas != 0]
        sigmas[sigmas != 0] = 1.0 - complement / (complement[-1] / (1.0 - 0.1))
        assert torch.equal(shifted_sigmas(steps, tokens).nan_to_num(-1), sigmas.nan_to_num(-1)), (steps, tokens)


def test_a_schedule_does_not_depend_on_the_cpus_instructions(monkeypatch):
    """Without AVX2, torch.linspace differs in the last bit. The sampler must not divide by a difference of 0 where the
    planner has seen none, nor one machine begin with other levels than the next."""
    here = [shifted_sigmas(*schedule) for schedule in drawn_schedules()]
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kw: torch.nextafter(linspace(*args, **kw), torch.zeros(())))
    for schedule, sigmas in zip(drawn_schedules(), here, strict=True):
        assert torch.equal(shifted_sigmas(*schedule).nan_to_num(-1), sigmas.nan_to_num(-1)), schedule


# The first sizes that fail, found with the reference's scheduler (v1.2.0).
@pytest.mark.parametrize(
    "height, width, steps, frames",
    [(704, 1280, 15, 1337), (1088, 1920, 15, 577), (1088, 1920, 30, 545), (1088, 1920, 1000, 385),
     (1408, 2560, 50, 297), (2176, 3840, 15, 145), (2176, 3840, 50, 121)],
)  # fmt: skip
def test_the_first_clip_whose_levels_coincide(height, width, steps, frames):
    shape = ClipShape(frames, height, width, 24.0)
    assert not is_sampled(steps, shape.half().video_tokens)
    assert most_frames(steps, shape) == frames - 8
    assert is_sampled(steps, ClipShape(frames - 8, height, width, 24.0).half().video_tokens)


@pytest.mark.parametrize("steps, side", [(2, 256), (3, 768), (12, 512), (15, 256), (15, 768), (40, 384)])
def test_every_clip_up_to_the_limit_that_a_message_names_can_be_sampled(steps, side):
    """Near the limit some schedules can be sampled and others below them cannot, as the rounding falls."""
    frames = most_frames(steps, ClipShape(2**20 + 1, side, side, 24.0))
    assert frames is not None

    def sampled(count: int) -> bool:
        return is_sampled(steps, ClipShape(count, side, side, 24.0).half().video_tokens)

    assert not sampled(frames + 8) and all(map(sampled, range(1, frames + 1, 8)))


def test_a_cpu_draws_by_the_lower_32_bits_of_a_seed():
    """docs/manifest.md says so. A PyTorch that used all of them would give other clips for rows of large seeds."""

    def noise(seed: int) -> torch.Tensor:
        ledger = NoiseLedger(seed, "cpu", "cpu")
        return ClipNoise(ledger, torch.device("cpu")).draw("stage_1.video", (4,), torch.float32)

    assert torch.equal(noise(5), noise(2**32 + 5)) and not torch.equal(noise(5), noise(6))


def test_sizes_beyond_every_schedule():
    assert not is_sampled(2, 2**40)
    assert most_frames(15, ClipShape(2**31 - 7, 1088, 1920, 24.0)) >= 569
    assert most_frames(15, ClipShape(9, 64 * 2**20, 64, 24.0)) is None


@pytest.mark.parametrize("steps", [2, 15, 1000])
def test_the_most_frames_of_small_clips_cost_little(steps, monkeypatch):
    """At 64x64 a frame is one token, and the limit lies tens of thousands of frames below what rows may ask for."""
    tried = []

    def counted(steps: int, tokens: int, schedule=host_sigmas):
        tried.append(tokens)
        return schedule(steps, tokens)

    monkeypatch.setattr(schedule_limits, "host_sigmas", counted)
    found = {most_frames(steps, ClipShape(800_001 + 8 * n, 64, 64, 24.0)) for n in range(100)}
    (frames,) = found
    tokens = ClipShape(frames, 64, 64, 24.0).half().video_tokens
    assert is_sampled(steps, tokens) and not is_sampled(steps, tokens + 1)
    assert len(tried) <= 6000, "rows of other lengths share the search"


def test_schedule_ends_at_a_tenth_then_zero():
    for steps in (2, 3, 15, 40):
        for tokens in (2, 1024, 8160, 16000):
            sigmas = shifted_sigmas(steps, tokens)
            assert sigmas.dtype == torch.float32 and len(sigmas) == steps + 1
            assert sigmas[0].item() == pytest.approx(1.0, abs=1e-6) and sigmas[-1] == 0.0
            assert sigmas[-2].item() == pytest.approx(0.1, abs=1e-6)
            assert (sigmas[:-1] > sigmas[1:]).all()


def test_more_tokens_keep_the_noise_longer():
    assert shifted_sigmas(15, 8160)[7] > shifted_sigmas(15, 1000)[7]


@pytest.mark.parametrize(
    "steps, tokens, expected",
    [  # v1.2.0
        (15, 8160, [1.0, 0.9934907, 0.9860149, 0.9773396, 0.9671507, 0.9550146]),
        (3, 18, [1.0, 0.6284894, 0.1, 0.0]),
        (2, 2, [1.0, 0.1, 0.0]),
        (30, 4096, [0.9999999, 0.994957, 0.989603, 0.9839084, 0.9778396, 0.9713582]),
    ],
)
def test_schedule_is_the_references(steps, tokens, expected):
    assert shifted_sigmas(steps, tokens)[: len(expected)].tolist() == pytest.approx(expected, abs=2e-7)


@pytest.mark.parametrize(
    "h, expected",
    [  # v1.2.0
        (0.05, (0.4938017594333477, -0.008128090585528325, 0.983539600571248)),
        (0.3, (0.4643067452498073, -0.04313230631056886, 0.9070715707048427)),
        (4.5, (0.1988001723195857, -0.12702264086412712, 0.3467761971889622)),
    ],
)
def test_coefficients_are_the_references(h, expected):
    assert coefficients(h) == pytest.approx(expected, rel=1e-14)


def test_noise_injection_is_the_references():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(1, 2, 3)
    noise = torch.linspace(1, -2, 6, dtype=torch.float64).view(1, 2, 3)
    sigmas = torch.tensor([0.9, 0.6])
    end = x * 0.3 + 0.1
    found = _replace_with_noise(AV(x, x), AV(end, end), AV(noise, noise), sigmas[0], sigmas[1]).video
    expected = [  # v1.2.0
        0.20182068422790866, 0.10216420222303983, 0.0025077202181712083,
        -0.09714876178669757, -0.1968052437915662, -0.2964617257964349,
    ]  # fmt: skip
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_a_generator_after_the_ledgers_draws_goes_on_as_the_first_one():
    first = ClipNoise(NoiseLedger(7, "cpu", "cpu"), torch.device("cpu"))
    shapes = [(1, 12, 8), (1, 5, 6), (1, 48, 8), (1, 5, 6)]
    drawn = [first.draw(str(n), shape, torch.bfloat16) for n, shape in enumerate(shapes)]
    halfway = NoiseLedger(7, "cpu", "cpu", first.ledger.draws[:2])
    again = ClipNoise(halfway, torch.device("cpu"))
    for n in (2, 3):
        assert torch.equal(again.draw(str(n), shapes[n], torch.bfloat16), drawn[n])
    assert again.ledger == first.ledger
    # With a draw less, or one of another size, the numbers after it differ.
    for draws in (halfway.draws[:1], (("0", (1, 12, 9), "bfloat16"), halfway.draws[1])):
        other = ClipNoise(NoiseLedger(7, "cpu", "cpu", draws), torch.device("cpu"))
        assert not torch.equal(other.draw("2", shapes[2], torch.bfloat16), drawn[2])


def test_a_cpu_without_avx2_rounds_the_same_noise_otherwise(tmp_path):
    """docs/parity.md says by how much. Machines of both kinds thus render the same clips, though not the same bits."""
    code = (
        "import sys, torch; g = torch.Generator().manual_seed(10); "
        "torch.save([torch.randn(2**17, generator=g, dtype=d) for d in (torch.bfloat16, torch.float32)], sys.argv[1])"
    )

    def drawn(capability: str) -> list[torch.Tensor]:
        file = tmp_path / capability
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, "-c", code, str(file)], env=environment, check=True)
        return torch.load(file)

    (bf16, fp32), (bf16_without, fp32_without) = drawn("avx2"), drawn("default")
    assert torch.allclose(fp32, fp32_without, rtol=0, atol=1e-5)
    assert torch.allclose(bf16.float(), bf16_without.float(), rtol=2**-7, atol=1e-5)
    assert (bf16 != bf16_without).sum() < 100


def test_first_draw_is_the_seeds():
    noise = ClipNoise(NoiseLedger(3, "cpu", "cpu"), torch.device("cpu")).draw("v", (1, 4, 2), torch.float32)
    expected = torch.randn((1, 4, 2), generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise, expected)


def test_a_cpu_takes_the_lower_half_of_a_seed():
    """As docs/manifest.md says of `seed`."""
    drawn = [
        ClipNoise(NoiseLedger(seed, "cpu", "cpu"), torch.device("cpu")).draw("v", (1, 4, 2), torch.bfloat16)
        for seed in (3, 3 + 2**32, 4)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "device, model, here, legal",
    [
        ("cuda", "NVIDIA H100", "NVIDIA H100", True),
        ("cuda", "NVIDIA H100", "NVIDIA H200", False),
        ("cuda", "NVIDIA H100", "cpu", False),
        ("cpu", "cpu", "NVIDIA H200", True),
        ("cpu", "cpu", "cpu", True),
    ],
)
def test_noise_can_be_drawn_again_on_the_same_kind_of_device(device, model, here, legal):
    ledger = NoiseLedger(7, device, model)
    if legal:
        check_noise_device(ledger, here)
        return
    with pytest.raises(WrongDevice, match=rf"{model}.*{here}; legal: GPUs of one model, or --noise-device cpu"):
        check_noise_device(ledger, here)


def test_sampler_noise_is_standard_and_the_same_for_every_clip():
    like = pair(0)
    one, two = SamplerNoise("cpu"), SamplerNoise("cpu")
    for noise in (one.substep(like), one.step(like)):
        for tensor in noise:
            assert tensor.dtype == torch.float64
            assert tensor.mean().item() == pytest.approx(0, abs=1e-12)
            assert tensor.std().item() == pytest.approx(1, rel=1e-12)
    assert torch.equal(two.substep(like).video, SamplerNoise("cpu").substep(like).video)
    assert not torch.equal(two.step(like).video, SamplerNoise("cpu").substep(like).video)
    raw = torch.randn((1, 12, 8), generator=torch.Generator().manual_seed(9999), dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack((raw.flatten(), SamplerNoise("cpu").substep(like).video.flatten())))
    assert correlation[0, 1] == pytest.approx(1)


def test_noise_is_mixed_by_scale_and_the_mask_keeps_the_clean_latent():
    noise, latent, clean = (torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    assert torch.equal(add_noise(noise, latent, clean, None, 1.0), noise)
    mixed = add_noise(noise, latent, clean, None, 0.25)
    assert torch.allclose(mixed, 0.75 * latent + 0.25 * noise)
    mask = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 1.0]).view(1, 6, 1)
    masked = add_noise(noise, latent, clean, mask, 0.25)
    assert torch.equal(masked[:, 0], clean[:, 0]) and torch.allclose(masked[:, 1], mixed[:, 1])
    assert torch.allclose(masked[:, 2], (clean[:, 2] + mixed[:, 2]) / 2)


def test_only_passes_that_change_something_are_made():
    assert passes_for(AV(PLAIN, PLAIN)) == ("cond",)
    assert passes_for(AV(guidance(cfg_scale=3.0), PLAIN)) == ("cond", "uncond")
    assert passes_for(AV(PLAIN, guidance(modality_scale=3.0))) == ("cond", "isolated")
    everything = guidance(cfg_scale=2.0, stg_scale=1.0, modality_scale=2.0, stg_blocks=(1,))
    assert passes_for(AV(everything, everything)) == ("cond", "uncond", "perturbed", "isolated")


def test_stg_without_blocks_makes_no_pass_unless_the_other_stream_has_some():
    idle = guidance(stg_scale=1.0)
    assert passes_for(AV(idle, idle)) == ("cond",)
    assert passes_for(AV(idle, guidance(stg_scale=1.0, stg_blocks=(2,)))) == ("cond", "perturbed")


def test_combine():
    c, u, p, m = (torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(n)) for n in range(4))
    results = {"cond": c, "uncond": u, "perturbed": p, "isolated": m}
    g = guidance(cfg_scale=3.0, stg_scale=0.5, modality_scale=2.0)
    expected = c + 2 * (c - u) + 0.5 * (c - p) + (c - m)
    assert torch.allclose(combine(g, results), expected, atol=1e-6)
    rescaled = combine(guidance(**{**g.__dict__, "rescale_scale": 0.4}), results)
    assert torch.allclose(rescaled, expected * (0.4 * c.std() / expected.std() + 0.6), atol=1e-6)
    assert torch.equal(combine(PLAIN, {"cond": c}), c)
    # No block is perturbed: the pass is not made, and its term is zero.
    without = {"cond": c, "uncond": u, "isolated": m}
    assert torch.allclose(combine(g, without), c + 2 * (c - u) + (c - m), atol=1e-6)
    assert combine(g, {k: v.bfloat16() for k, v in results.items()}).dtype == torch.bfloat16


def test_skip_step():
    g = guidance(skip_step=2)
    assert [skips(g, n) for n in range(6)] == [False, True, True, False, True, True]
    assert not any(skips(PLAIN, n) for n in range(6))


def test_a_stream_that_skips_uses_its_last_result():
    calls: list[tuple[str, AV[bool]]] = []

    def run_pass(name, latents, sigma, enabled):
        calls.append((name, enabled))
        return latents.map(lambda t: t + len(calls))

    denoise = GuidedDenoiser(run_pass, AV(guidance(skip_step=1), PLAIN))
    latents = pair(0)
    first = denoise(latents, torch.tensor(1.0), 0)
    second = denoise(latents, torch.tensor(0.9), 1)
    assert calls == [("cond", AV(True, True)), ("cond", AV(False, True))]
    assert second.video is first.video and torch.equal(second.audio, latents.audio + 2)
    both = GuidedDenoiser(run_pass, AV(guidance(skip_step=1), guidance(skip_step=1)))
    result = both(latents, torch.tensor(1.0), 0)
    calls.clear()
    assert both(latents, torch.tensor(0.9), 1) is result and not calls


def test_a_stream_that_skips_needs_no_pass():
    calls: list[str] = []

    def run_pass(name, latents, sigma, enabled):
        calls.append(name)
        return latents

    video = guidance(cfg_scale=3.0, stg_scale=1.0, stg_blocks=(1,), skip_step=1)
    denoise = GuidedDenoiser(run_pass, AV(video, guidance(modality_scale=3.0)))
    denoise(pair(0), torch.tensor(1.0), 0)
    assert calls == ["cond", "uncond", "perturbed", "isolated"]
    calls.clear()
    denoise(pair(0), torch.tensor(0.9), 1)
    assert calls == ["cond", "isolated"]


class _ZeroNoise:
    """A noise source of zeros."""

    def substep(self, like):
        return like.map(lambda t: torch.zeros_like(t, dtype=torch.float64))

    step = substep


def test_res2s_call_order_and_result():
    seen: list[tuple[float, int, torch.dtype, torch.dtype]] = []
    target = pair(1)

    def denoise(latents, sigma, step):
        seen.append((sigma.item(), step, sigma.dtype, latents.video.dtype))
        return target

    sigmas = shifted_sigmas(3, 18)
    result = sample_res2s(denoise, pair(2), sigmas, SamplerNoise("cpu"), lambda x: x)
    assert torch.equal(result.video, target.video) and torch.equal(result.audio, target.audio)
    assert len(seen) == 7
    assert [step for _, step, _, _ in seen] == [0, 0, 1, 0, 2, 0, 3]
    assert [d for _, _, d, _ in seen] == [torch.float32, torch.float64] * 3 + [torch.float32]
    called_at = [sigma for sigma, *_ in seen]
    assert called_at[1] == pytest.approx(math.sqrt(called_at[0] * called_at[2]))
    assert called_at[-1] == pytest.approx(0.0011)


def test_res2s_blends_after_every_call_and_injection():
    blended = 0

    def blend(x):
        nonlocal blended
        blended += 1
        return x

    sample_res2s(lambda x, s, n: x, pair(2), shifted_sigmas(3, 18), _ZeroNoise(), blend)
    assert blended == 3 * 4 + 1


def test_res2s_keeps_the_latents_dtype():
    sigmas = torch.tensor([0.909375, 0.725, 0.0])
    result = sample_res2s(lambda x, s, n: x, pair(2, torch.bfloat16), sigmas, SamplerNoise("cpu"), lambda x: x)
    assert result.video.dtype == torch.bfloat16


def test_the_planner_knows_every_sampler():
    from ltx_ray.presets import PIPELINES, SAMPLER_TRAITS
    from ltx_ray.sampling.samplers import SAMPLERS

    assert SAMPLERS.keys() == SAMPLER_TRAITS.keys() >= {pipeline.sampler for pipeline in PIPELINES.values()}
    assert [traits.model_calls(15) for traits in SAMPLER_TRAITS.values()] == [31, 15]
