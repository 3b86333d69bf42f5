"""The transformer on one stage of one clip: guidance passes from latents to denoised latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ltx_ray.engine.initial_state import LatentState
from ltx_ray.model.fused import FusedTransformer
from ltx_ray.model.graphs import GraphedTransformer
from ltx_ray.model.rope import RopeTable
from ltx_ray.model.transformer import NO_PERTURBATION, Modality, Perturbation, Prefix, Transformer
from ltx_ray.parallel.collectives import SINGLE_RANK, RankGroup
from ltx_ray.records import AV, Conditions, Guidance, PromptContext
from ltx_ray.sampling.guidance import BATCHED_PASS, RunPasses
from ltx_ray.sampling.passes import Pass, divide_passes, needs_perturbed

#: The plain transformer, or one of the two that run its fused path.
Dit = Transformer | FusedTransformer | GraphedTransformer
#: Text contexts (B, S, D) of the passes that have one of their own. All others take that of the conditional pass.
PassContexts = Mapping[str, AV[torch.Tensor]]


def pass_contexts(
    conditions: Conditions, device: torch.device, dtype: torch.dtype, batched: bool
) -> dict[str, AV[torch.Tensor]]:
    """Contexts of the passes on `device`. `batched`: also of the two prompts as a batch of two."""

    def on_device(prompt: PromptContext) -> AV[torch.Tensor]:
        return prompt.context.map(lambda t: t.to(device, dtype))

    contexts: dict[str, AV[torch.Tensor]] = {Pass.COND: on_device(conditions.positive)}
    if conditions.negative is not None:
        contexts[Pass.UNCOND] = on_device(conditions.negative)
        if batched:
            contexts[BATCHED_PASS] = contexts[Pass.COND].map(lambda a, b: torch.cat((a, b)), contexts[Pass.UNCOND])
    return contexts


def pass_perturbations(guidance: AV[Guidance]) -> dict[str, Perturbation]:
    """What the perturbed and the isolated pass take away."""
    blocks = guidance.map(lambda g: frozenset(g.stg_blocks) if needs_perturbed(g) else frozenset())
    return {Pass.PERTURBED: Perturbation(values_only=blocks), Pass.ISOLATED: Perturbation(isolated=True)}


def run_divided(peers: RankGroup) -> RunPasses:
    """A guidance.RunPasses that runs each pass on one rank of `peers` and broadcasts its result to all."""

    def run_passes(
        names: tuple[Pass, ...], run: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
    ) -> dict[Pass, AV[torch.Tensor]]:
        divided = divide_passes(names, peers.size)
        own = {name: run(name) for name in divided[peers.rank]}

        def broadcast(name: Pass, source: int) -> AV[torch.Tensor]:
            result = own[name].map(torch.Tensor.contiguous) if name in own else like.map(_empty_like)
            return result.map(lambda x: peers.broadcast_(x, source))

        found = {name: broadcast(name, source) for source, names in enumerate(divided) for name in names}
        return {name: found[name] for name in names}

    return run_passes


class StageModel:
    """Runs guidance passes of `dit` from `state` on. `run_pass` and `denoise` are what samplers and guidance take.

    The ranks of `sequence_group` divide the video's tokens.
    """

    def __init__(
        self,
        dit: Dit,
        state: LatentState,
        contexts: PassContexts,
        perturbations: Mapping[str, Perturbation],
        dtype: torch.dtype,
        sequence_group: RankGroup = SINGLE_RANK,
    ):
        self._dit, self._contexts, self._perturbations = dit, contexts, perturbations
        self._sequence_group = sequence_group
        self._fused = not isinstance(dit, Transformer)
        if isinstance(dit, Transformer):
            self._ropes = dit.ropes(state.positions, dtype)
        else:
            self._ropes = dit.ropes(state.positions, dtype, sequence_group)
        self._prefix: _CallPrefix | None = None
        self._levels = _NoiseLevels(state, state.latents.video.device, distinct=self._fused)

    def denoise(self, latents: AV[torch.Tensor], sigma: torch.Tensor, step_index: int) -> AV[torch.Tensor]:
        """x0 without guidance, on the positive prompt alone (a sampler.Denoise)."""
        return self.run_pass(Pass.COND, latents, sigma, AV(True, True))

    def run_pass(
        self, name: str, latents: AV[torch.Tensor], sigma: torch.Tensor, enabled: AV[bool]
    ) -> AV[torch.Tensor]:
        """x0 of one pass on packed `latents` (1, T, C) at `sigma` (0-d, on the host). A guidance.RunPass."""
        levels = self._levels.at(sigma)

        def modality(
            x: torch.Tensor,
            timesteps: torch.Tensor,
            context: torch.Tensor,
            ropes: tuple[RopeTable, RopeTable],
            on: bool,
            index: torch.Tensor | None,
        ) -> Modality:
            # A graph reads contiguous copies, and the pass before its capture must round as it does.
            x = x.contiguous() if self._fused else x
            x = x.expand(len(context), -1, -1)
            return Modality(x, levels.sigma, timesteps, context, *ropes, enabled=on, level_index=index)

        context = self._contexts.get(name, self._contexts[Pass.COND])
        inputs = latents.map(modality, levels.timesteps, context, self._ropes, enabled, self._levels.index)
        perturbation = self._perturbations.get(name, NO_PERTURBATION)
        prefix = self._prefix_of(name, latents, sigma, enabled)
        velocities = self._dit(inputs, perturbation, self._sequence_group, prefix)
        return latents.map(_x0, velocities, levels.token_sigmas)

    def _prefix_of(self, name: str, latents: AV[torch.Tensor], sigma: torch.Tensor, enabled: AV[bool]) -> Prefix | None:
        """The first blocks, which the conditional pass of a call leaves for the perturbed one.

        The two have the same inputs, and differ from the first perturbed block of an enabled stream on.
        """
        values_only = self._perturbations.get(Pass.PERTURBED, NO_PERTURBATION).values_only
        blocks = [min(blocks) for blocks, on in zip(values_only, enabled, strict=True) if on and blocks]
        call = _CallPrefix(Prefix(min(blocks, default=0)), latents, sigma, enabled)
        if not call.prefix.length:
            return None
        if name in (Pass.COND, BATCHED_PASS):
            self._prefix = call
            return call.prefix
        if name != Pass.PERTURBED:
            return None
        begun, self._prefix = self._prefix, None
        return begun.prefix if begun is not None and begun.is_of(call) else None


@dataclass(frozen=True)
class _CallPrefix:
    """The prefix of the call with these very latents and this very sigma."""

    prefix: Prefix
    latents: AV[torch.Tensor]
    sigma: torch.Tensor
    enabled: AV[bool]

    def is_of(self, other: _CallPrefix) -> bool:
        same = all(a is b for a, b in zip((*self.latents, self.sigma), (*other.latents, other.sigma), strict=True))
        return same and self.enabled == other.enabled


def _empty_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _x0(x: torch.Tensor, velocity: torch.Tensor, token_sigmas: torch.Tensor) -> torch.Tensor:
    """x - velocity * sigma, for x (1, T, C) and the sigmas (1, T) or (1, 1) of its tokens, in float32."""
    return (x.float() - velocity.float() * token_sigmas.float()[..., None]).to(x.dtype)


@dataclass(frozen=True)
class _Levels:
    """Noise levels of a call: of the stage (1,), of every token (1, T) or (1, 1), and what the model is given."""

    sigma: torch.Tensor
    token_sigmas: AV[torch.Tensor]
    timesteps: AV[torch.Tensor]


class _NoiseLevels:
    """The noise levels of a stage's calls, made once for all passes of a call and without waiting for the device.

    `distinct`: the model is given the distinct levels instead of one for every token.
    """

    def __init__(self, state: LatentState, device: torch.device, distinct: bool):
        self._state, self._device = state, device
        self._last: tuple[torch.Tensor, _Levels] | None = None
        self._distinct_masks: torch.Tensor | None = None
        #: Which of the distinct levels each token has (T,), None where the model is given one for every token.
        self.index: AV[torch.Tensor | None] = AV(None, None)
        if distinct and state.denoise_mask is not None:
            self._distinct_masks, index = torch.unique(state.denoise_mask[0, :, 0], return_inverse=True)
            self.index = AV(index.int(), None)

    def at(self, sigma: torch.Tensor) -> _Levels:
        """The levels of the call at `sigma`. Passes of one call give the same tensor object."""
        if self._last is None or self._last[0] is not sigma:
            level = torch.full((1,), sigma.item(), dtype=sigma.dtype, device=self._device)
            token_sigmas = timesteps = self._state.token_sigmas(level)
            if self._distinct_masks is not None:
                timesteps = AV(self._distinct_masks[None] * level, token_sigmas.audio)
            self._last = sigma, _Levels(level, token_sigmas, timesteps)
        return self._last[1]
