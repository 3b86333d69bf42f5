"""Flow matching of the miniature's DiT: what it is given and what its file gives are as in the engine."""

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.safetensors import read_header
from ltx_ray.checkpoints.transformer_keys import CONNECTOR_PREFIXES, TRANSFORMER_PREFIX
from ltx_ray.config import EngineSpec, GangLayout, ModelFiles, Numerics
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import Rank
from ltx_ray.engine.initial_state import ImageConditioning, noised_state
from ltx_ray.engine.patchify import patchify_video
from ltx_ray.engine.text import TextEngine
from ltx_ray.miniature import export, gemma, picture, world
from ltx_ray.miniature.config import ACTIVE_AUDIO, ACTIVE_VIDEO
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK
from ltx_ray.parallel.loading import load_shard
from ltx_ray.parallel.lora import LoraMerger, LoraSetting
from ltx_ray.records import AV, NoiseLedger
from ltx_ray.sampling.noise import ClipNoise
from ltx_ray.shapes import ClipShape
from scripts.miniature_training import diffusion, flow, latent_pool, lora
from scripts.miniature_training.prompts import TEXT_TOKENS, FrozenGemma

SHAPE = ClipShape(9, 64, 96, 24.0)
FRAME_TOKENS, TOKENS, SOUNDS = 6, 12, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    gemma.write_gemma(path / "gemma")
    return path


@pytest.fixture(scope="module")
def model(folder) -> flow.TextAndDit:
    """A model with random velocities, whose weights are bfloat16 numbers as in a file."""
    torch.manual_seed(0)
    model = flow.TextAndDit(torch.float32)
    with torch.no_grad():
        for name, weight in model.transformer.named_parameters():
            if "adaln" in name or "table" in name:
                weight.add_(0.1 * torch.randn(weight.shape))
        for names, active in zip(flow.STREAM_NAMES, flow.ACTIVE, strict=True):
            model.transformer.get_submodule(names.proj_out).get_parameter("weight")[:active].normal_(0, 0.1)
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    diffusion.write(model, folder / "transformer.safetensors")
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def transformer(folder, model) -> Transformer:
    """The transformer as the engine loads it."""
    header = read_header(folder / "transformer.safetensors")
    tensors = {
        key.removeprefix(TRANSFORMER_PREFIX): info
        for key, info in header.tensors.items()
        if key.startswith(TRANSFORMER_PREFIX) and not key.startswith(CONNECTOR_PREFIXES)
    }
    with torch.device("meta"):
        loaded = Transformer(export.transformer_config())
    load_shard(loaded, tensors, SINGLE_RANK, dtype=torch.float32, device=torch.device("cpu"))
    return loaded


def batch(held: torch.Tensor | None = None, sigma: float = 0.6, rows: int = 2) -> flow.NoisyBatch:
    torch.manual_seed(3)
    sizes = AV((rows, TOKENS, ACTIVE_VIDEO), (rows, SOUNDS, ACTIVE_AUDIO))
    hidden = torch.randn(1, TEXT_TOKENS, 128)
    mask = (torch.arange(TEXT_TOKENS) < 9).long()[None]
    return flow.NoisyBatch(
        sizes.map(torch.randn), sizes.map(torch.randn), torch.full((1,), sigma), hidden, mask, held
    )  # fmt: skip


def test_the_engine_finds_the_same_context(folder, model):
    """Of a prompt that training pads on the other side, with rotary tables and kernels of its own."""
    files = ModelFiles(str(folder / "transformer.safetensors"), str(folder / "gemma"), "")
    engine = TextEngine(EngineSpec("", files, Numerics(dtype="float32"), "", layout=GangLayout()), Rank())
    engine.load()
    prompt = world.canonical_prompt(world.scenes("train")[99])
    frozen = FrozenGemma(folder / "gemma", torch.float32, "cpu")
    found = model.contexts(*frozen.hidden_states([prompt]).padded(torch.tensor([0])))
    for ours, theirs in zip(found, engine.encode(prompt).context, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4)


def test_the_engines_transformer_gives_the_same_velocities_whatever_is_in_unused_channels(model, transformer):
    noisy = batch()
    contexts = model.contexts(noisy.hidden, noisy.mask)
    ropes = flow.ropes_of(model.transformer, SHAPE, torch.float32, "cpu")
    inputs, _ = flow.noisy_inputs(noisy, contexts, ropes, FRAME_TOKENS, torch.float32)
    ours = model.velocities(inputs, NO_PERTURBATION)

    def with_noise(modality: Modality, active: int) -> Modality:
        latent = modality.latent.clone()
        latent[..., active:] = torch.randn(latent[..., active:].shape)
        return Modality(latent, *list(vars(modality).values())[1:])

    theirs = transformer(inputs.map(with_noise, flow.ACTIVE))
    for x, y, active in zip(ours, theirs, flow.ACTIVE, strict=True):
        assert x.std() > 0.05
        assert torch.allclose(x, y[..., :active], atol=1e-5)
        assert (y[..., active:] == 0).all()


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_clip_with_an_image_begins_as_in_the_engine(model, strength):
    noisy = batch(torch.tensor([1 - strength]), sigma=1.0, rows=1)
    ropes = flow.ropes_of(model.transformer, SHAPE, torch.float32, "cpu")
    contexts = model.contexts(noisy.hidden, noisy.mask)
    inputs, levels = flow.noisy_inputs(noisy, contexts, ropes, FRAME_TOKENS, torch.float32)

    image = torch.zeros(1, 128, 1, 2, 3)
    image[:, :ACTIVE_VIDEO] = noisy.latents.video[:, :FRAME_TOKENS].transpose(1, 2).unflatten(2, (1, 2, 3))

    class KnownNoise(ClipNoise):
        def draw(self, name, shape, dtype):
            known = noisy.noise.video if name.endswith("video") else noisy.noise.audio
            return torch.nn.functional.pad(known, (0, shape[-1] - known.shape[-1]))

    noise = KnownNoise(NoiseLedger(0, "cpu", "cpu"), torch.device("cpu"))
    zeros = AV(torch.zeros(1, TOKENS, 128), torch.zeros(1, SOUNDS, 128))
    state = noised_state(SHAPE, "stage_1", noise, zeros, 1.0, [ImageConditioning(0, strength, image)])
    assert torch.allclose(inputs.video.latent, state.latents.video, atol=1e-6)
    assert torch.allclose(levels.video, state.token_sigmas(torch.ones(1)).video, atol=1e-6)
    for (ours, _), (theirs, _) in zip(ropes, model.transformer.ropes(state.positions, torch.float32), strict=True):
        assert torch.equal(ours.cos, theirs.cos)


def test_clips_that_share_keys_of_their_text_have_the_velocities_of_clips_alone(model):
    """Also in a copy of the model, which shares on its own account."""
    torch.manual_seed(6)
    noisy = batch(torch.tensor([1.0, 0.0, 0.5, 1.0, 0.2, 0.7]), rows=6)
    hidden = torch.randn(2, TEXT_TOKENS, 128)
    noisy = replace(noisy, prompt_sigma=torch.tensor([0.9, 0.3]), hidden=hidden, mask=noisy.mask.expand(2, -1))
    ropes = flow.ropes_of(model.transformer, SHAPE, torch.float32, "cpu")
    inputs, _ = flow.noisy_inputs(noisy, model.contexts(noisy.hidden, noisy.mask), ropes, FRAME_TOKENS, torch.float32)
    alone = model.velocities(inputs, NO_PERTURBATION)
    # Only the contexts of each prompt's first clip are read.
    read = torch.tensor([True, False, False])[:, None, None].repeat(2, 1, 1)
    others = inputs.map(lambda s: replace(s, context=s.context.where(read, 7.0)))
    for net in (model, copy.deepcopy(model)):
        together = net.velocities(others, NO_PERTURBATION, noisy.clips_per_prompt)
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(model.velocities(others, NO_PERTURBATION).video, alone.video, atol=1e-2)


def test_held_tokens_count_for_nothing(model):
    ropes = flow.ropes_of(model.transformer, SHAPE, torch.float32, "cpu")

    def losses(held: float, changed: float) -> torch.Tensor:
        noisy = batch(torch.full((2,), held))
        noisy.noise.video[:, :FRAME_TOKENS] += changed
        return flow.flow_losses(model, noisy, ropes, FRAME_TOKENS, NO_PERTURBATION)["video"]

    assert torch.equal(losses(0.0, 0.0), losses(0.0, 5.0))
    assert not torch.equal(losses(0.3, 0.0), losses(0.3, 5.0))


def test_in_bfloat16_every_weight_gets_a_gradient_near_that_of_float32(model):
    torch.manual_seed(5)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        net = flow.TextAndDit(dtype)
        net.load_state_dict(model.state_dict())
        ropes = flow.ropes_of(net.transformer, SHAPE, net.dtype, "cpu")
        losses = flow.flow_losses(net, batch(torch.tensor([0.0, 1.0])), ropes, FRAME_TOKENS, NO_PERTURBATION)
        named = dict(net.named_parameters())
        found = torch.autograd.grad(losses["loss"], named.values(), allow_unused=True)
        gradients.append({name: grad for name, grad in zip(named, found, strict=True) if grad is not None})
    half, whole = gradients
    assert half.keys() == whole.keys() and all(grad.dtype == torch.float32 for grad in half.values())
    flat = [torch.cat([grads[name].flatten() for name in whole]) for grads in (half, whole)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99


def test_isolated_streams_do_not_hear_each_other(model):
    ropes, noisy = flow.ropes_of(model.transformer, SHAPE, torch.float32, "cpu"), batch()

    def video_loss(isolated: bool, changed: float) -> torch.Tensor:
        other = replace(noisy, latents=AV(noisy.latents.video, noisy.latents.audio + changed))
        return flow.flow_losses(model, other, ropes, FRAME_TOKENS, Perturbation(isolated=isolated))["video"]

    assert torch.equal(video_loss(True, 0.0), video_loss(True, 3.0))
    assert not torch.equal(video_loss(False, 0.0), video_loss(False, 3.0))


def test_queries_begin_with_the_words():
    torch.manual_seed(1)
    model = flow.TextAndDit(torch.float32)
    noisy = batch()

    @torch.no_grad()
    def share_of_words() -> float:
        context = model.contexts(noisy.hidden, noisy.mask).video
        attention = model.transformer.blocks[0].attn2
        q = attention.q_norm(attention.to_q(torch.randn(1, 50, 96))).unflatten(-1, (4, 24)).transpose(1, 2)
        k = attention.k_norm(attention.to_k(context)).unflatten(-1, (4, 24)).transpose(1, 2)
        return float((q @ k.mT / 24**0.5).softmax(-1)[..., :9].sum(-1).mean())

    assert share_of_words() < 0.1
    model.prepare(noisy.hidden, noisy.mask)
    assert share_of_words() > 0.5


def test_muon_takes_matrices_alone():
    model = flow.TextAndDit(torch.float32)
    taken = {name for name, weight in model.named_parameters() if weight.dim() >= 2 and flow.takes_muon(name)}
    assert "transformer.transformer_blocks.4.audio_ff.net.0.proj.weight" in taken
    assert "connectors.audio_connector.transformer_blocks.0.attn1.to_out.0.weight" in taken
    assert not [name for name in taken if "table" in name or "adaln" in name or "gate" in name or "register" in name]
    assert sum(weight.numel() for name, weight in model.named_parameters() if name in taken) > 1.1e6


def test_noise_levels():
    generator = torch.Generator().manual_seed(0)
    for top in (1.0, 0.92):
        levels = diffusion.draw_sigmas(generator, 4096, top)
        assert 0 < levels.min() < 0.01 and levels.max() == top
        assert 0.55 < (levels / top > 0.5).float().mean() < 0.75
        assert 0.02 < (levels == top).float().mean() < 0.04


def test_the_first_latent_frame_is_that_of_its_image():
    """So the clean latents of a clip stand for those of an image of its first frame."""
    weights = export.WEIGHTS
    encoders = latent_pool.FrozenEncoders(
        weights / "vae.safetensors", weights / "audio.safetensors", torch.float32, "cpu"
    )
    clips = [world.draw_clip(random.Random(5), "train", 1.5)]
    whole, first = encoders.video(clips, SHAPE), encoders.video(clips, ClipShape(1, 64, 96, 24.0))
    assert torch.allclose(whole[:, :FRAME_TOKENS], first, atol=1e-4)
    # The engine's latents, packed.
    vae = components.load_video_vae(weights / "vae.safetensors", torch.float32, "cpu", part="encoder")
    latents = codec.encode_video(vae, picture.draw_frames(clips, SHAPE.num_frames, SHAPE.height, SHAPE.width))
    assert torch.equal(whole, patchify_video(latents)[..., :ACTIVE_VIDEO])
    pool = latent_pool.LatentPool(encoders, SHAPE, world.scenes("train")[:50], 8, "test")
    drawn = pool.draw(64, torch.Generator().manual_seed(0))
    assert drawn.latents.video.shape == (64, TOKENS, ACTIVE_VIDEO) and drawn.latents.video.std() > 0.5
    assert drawn.latents.audio.shape == (64, SOUNDS, ACTIVE_AUDIO) and drawn.scenes.max() < 50
    before = pool.draw(64, torch.Generator().manual_seed(0)).latents.video
    pool.renew(4)
    changed = (pool.draw(64, torch.Generator().manual_seed(0)).latents.video != before).any(dim=(1, 2))
    assert 0 < changed.sum() < 64


# --- the distilled LoRA ------------------------------------------------------------------------------------------


def test_the_engine_merges_the_lora_to_the_students_weights(tmp_path, model, folder, transformer):
    torch.manual_seed(2)
    student = lora.LoraFactors(model.transformer)
    plain = student.merged(model.transformer, torch.tensor(1.0), torch.float32)
    for name, weight in model.transformer.named_parameters():
        assert torch.equal(plain[name], weight), name  # at first it changes nothing
    with torch.no_grad():
        for b in student.b:
            b.normal_(0, 0.1)
        for factor in student.parameters():
            factor.copy_(factor.bfloat16().float())
    path = tmp_path / "lora.safetensors"
    lora.write(student, path)
    header = read_header(folder / "transformer.safetensors")
    tensors = {
        key.removeprefix(TRANSFORMER_PREFIX): info
        for key, info in header.tensors.items()
        if key.startswith(TRANSFORMER_PREFIX) and not key.startswith(CONNECTOR_PREFIXES)
    }
    linears = {n[: -len(".weight")]: i.shape for n, i in tensors.items() if n.endswith(".weight") and len(i.shape) == 2}
    pairs = open_lora(str(path)).fit(linears, "the miniature")
    assert pairs.keys() == {name for name in linears if ".timestep_embedder." not in name}
    assert len(pairs) == len(student.names)
    assert {pair.rank for pair in pairs.values()} == {8}
    merger = LoraMerger(transformer, tensors, [pairs], SINGLE_RANK)
    try:
        with torch.no_grad():
            merger.switch_to(LoraSetting(((0, 0.5),)))
        wanted = student.merged(model.transformer, torch.tensor(0.5), torch.float32)
        for name, weight in transformer.named_parameters():
            assert torch.allclose(weight, wanted[name], atol=1e-5), name
    finally:
        with torch.no_grad():
            merger.switch_to(LoraSetting())


class FixedClips:
    """Stands for Batches: clips of ones, noise of zeros."""

    def draw(self, kind, count):
        ones = AV(torch.ones(count, TOKENS, ACTIVE_VIDEO), torch.ones(count, SOUNDS, ACTIVE_AUDIO))
        return ones, torch.arange(count)

    def noise(self, latents):
        return latents.map(torch.zeros_like)


def test_a_rollout_goes_through_all_levels_and_begins_again():
    sigmas = torch.tensor(lora.DISTILLED_SIGMAS)
    rollouts = lora.Rollouts(FixedClips(), diffusion.Kind((9, 64, 96)), 16, sigmas)
    assert (rollouts.states.level == 0).all() and (rollouts.states.latents.video == 0).all()
    seen = []
    for number in range(1, 30):
        rollouts.advance(rollouts.states.latents.map(lambda x, n=number: torch.full_like(x, n)))
        seen.append(rollouts.states.level.tolist())
        going = rollouts.states.level > 0
        assert (rollouts.states.latents.video[going] == number).all()
        assert (rollouts.states.latents.video[~going] == 0).all()
    assert sorted(set(seen[20])) == list(range(8))
    by_row = list(zip(*seen, strict=True))
    assert by_row[0][:9] == (1, 2, 3, 4, 5, 6, 7, 0, 1)


def test_the_teacher_is_what_a_strength_of_0_learns(model, folder):
    """Without guidance and in one step, the student begins where the teacher is."""
    scenes = world.scenes("train")[:2]
    frozen = FrozenGemma(folder / "gemma", torch.float32, "cpu")
    prompts = lora.TrainingPrompts(frozen, scenes, 0, 0)
    kind = diffusion.Kind((9, 64, 96))
    student = lora.LoraFactors(model.transformer)
    noisy = batch(rows=3)
    level = torch.tensor([0, 5, 7])
    states = (*noisy.latents, level, torch.tensor([0, 70, prompts.negative(1)]))

    def losses(strength: float, guidance: float, steps: int = 1, held=None) -> dict[str, torch.Tensor]:
        size = lora.LoraSize(diffusion.SMOKE, steps, AV(guidance, guidance))
        run = lora.Distillation(model, student, prompts, size, "cpu").of(kind)
        return run(*states, torch.tensor(strength), *([] if held is None else [held]))

    plain = losses(1.0, 1.0)
    assert plain["loss"] < 1e-9
    step = torch.tensor(lora.DISTILLED_SIGMAS).diff()[level][:, None, None]
    moved = (plain["video next"] - noisy.latents.video) / step
    assert moved.std() > 0.05
    guided = losses(1.0, 3.0)
    assert guided["video"] > 1e-4 and torch.allclose(guided["video"], guided["video without"])
    assert losses(0.0, 3.0)["loss"] < 1e-9
    assert torch.allclose(losses(0.5, 3.0)["video"], guided["video"] / 4, rtol=1e-3)
    assert losses(1.0, 1.0, steps=3)["loss"] > 1e-6  # where the path is curved
    assert losses(1.0, 1.0, held=torch.zeros(3))["loss"] < 1e-9
