"""Guidance: the passes of a call, and how their results are combined.

Source: `guiders.py` and `denoisers.py` of the reference v1.2.0. All on denoised results (x0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ltx_ray.records import AV, Guidance
from ltx_ray.sampling.passes import passes_for

#: (pass name, latents, sigma, enabled) -> x0 of both streams.
RunPass = Callable[[str, AV[torch.Tensor], torch.Tensor, AV[bool]], AV[torch.Tensor]]
#: (pass names, make one, tensors that its result is like) -> the results of all, by name.
Share = Callable[[tuple[str, ...], Callable[[str], AV[torch.Tensor]], AV[torch.Tensor]], Mapping[str, AV[torch.Tensor]]]


def skips(g: Guidance, step_index: int) -> bool:
    """Whether a stream sits this call out: all but every (skip_step + 1)-th."""
    return g.skip_step > 0 and step_index % (g.skip_step + 1) != 0


def combine(g: Guidance, results: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Guided x0 from the passes' x0 (any shape), in float32, returned in their dtype.

    A pass that was not made counts as zero, which is how the reference has it: its scale is then
    the neutral one and the term vanishes.
    """
    cond = results["cond"].float()

    def away_from(name: str, weight: float) -> torch.Tensor | float:
        if name not in results:
            # nothing was perturbed, so that pass would have been `cond` again
            return 0.0 if name == "perturbed" else weight * cond
        return weight * (cond - results[name].float())

    guided = (
        cond
        + away_from("uncond", g.cfg_scale - 1)
        + away_from("perturbed", g.stg_scale)
        + away_from("isolated", g.modality_scale - 1)
    )
    if g.rescale_scale != 0:
        factor = cond.std() / guided.std()
        guided = guided * (g.rescale_scale * factor + (1 - g.rescale_scale))
    return guided.to(results["cond"].dtype)


def make_all(
    names: tuple[str, ...], make: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
) -> dict[str, AV[torch.Tensor]]:
    """All passes one after the other, on this rank."""
    return {name: make(name) for name in names}


#: The passes that differ in their prompt alone, and what both are called as one pass of two batch entries.
PAIR = ("cond", "uncond")
PAIRED = "+".join(PAIR)


def make_pair(
    names: tuple[str, ...], make: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
) -> dict[str, AV[torch.Tensor]]:
    """All passes on this rank, the pair of them in one."""
    if not set(PAIR) <= set(names):
        return make_all(names, make, like)
    both = make(PAIRED)
    paired = {name: both.map(lambda x, n=number: x[n : n + 1]) for number, name in enumerate(PAIR)}
    return {name: paired[name] if name in paired else make(name) for name in names}


@dataclass
class GuidedDenoiser:
    """A denoiser for the samplers: all passes of one call, combined for each stream.

    Remembers its last results, which a stream that skips a call uses again. `share` may spread the passes
    over ranks: it gets their names, a function that makes one, and the latents, which results are like.
    """

    run_pass: RunPass
    guidance: AV[Guidance]
    share: Share = make_all
    _last: AV[torch.Tensor | None] = field(default_factory=lambda: AV(None, None))

    def __call__(self, latents: AV[torch.Tensor], sigma: torch.Tensor, step_index: int) -> AV[torch.Tensor]:
        skipped = self.guidance.map(lambda g: skips(g, step_index))
        if not (skipped.video and skipped.audio):
            enabled = skipped.map(lambda skip: not skip)
            names = passes_for(g for g, on in zip(self.guidance, enabled, strict=True) if on)
            results = self.share(names, lambda name: self.run_pass(name, latents, sigma, enabled), latents)
            videos = {name: result.video for name, result in results.items()}
            audios = {name: result.audio for name, result in results.items()}
            self._last = AV(
                self._last.video if skipped.video else combine(self.guidance.video, videos),
                self._last.audio if skipped.audio else combine(self.guidance.audio, audios),
            )
        assert self._last.video is not None and self._last.audio is not None  # step 0 is never skipped
        return self._last
