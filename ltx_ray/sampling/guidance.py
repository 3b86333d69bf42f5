"""Guidance: the model passes of a denoiser's call, and how their results are combined.

Formulas: docs/ltx-2.3.md#guidance. Source: `ltx_core/components/guiders.py` and `ltx_pipelines/utils/denoisers.py` of
the reference v1.2.0. Everything works on denoised latents (x0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ltx_ray.records import AV, Guidance
from ltx_ray.sampling.passes import Pass, passes_for

#: The two passes that differ in their prompt alone, and the name of the pass that makes both as a batch of two.
BATCHED = (Pass.COND, Pass.UNCOND)
BATCHED_PASS = "+".join(BATCHED)

#: (name of a pass or BATCHED_PASS, latents, sigma, enabled streams) -> x0 of both streams, a batch of two if batched.
RunPass = Callable[[str, AV[torch.Tensor], torch.Tensor, AV[bool]], AV[torch.Tensor]]
#: (names of passes, function that runs one by name, tensors shaped like its result) -> results by name.
RunPasses = Callable[
    [tuple[Pass, ...], Callable[[str], AV[torch.Tensor]], AV[torch.Tensor]], Mapping[Pass, AV[torch.Tensor]]
]


def skips(g: Guidance, step_index: int) -> bool:
    """Whether a stream sits out the call of this step: it takes part in every (skip_step + 1)-th only."""
    return g.skip_step > 0 and step_index % (g.skip_step + 1) != 0


def combine(g: Guidance, results: Mapping[Pass, torch.Tensor]) -> torch.Tensor:
    """Guided x0 of a stream from the x0 of its passes (any shape), computed in float32 and returned in their dtype.

    CFG is arXiv:2207.12598, STG arXiv:2411.18664, rescaling arXiv:2305.08891 (section 3.4). A pass that was not made
    counts as zero, as in the reference: its weight is then 0 and the term vanishes.
    """
    cond = results[Pass.COND].float()

    def term(name: Pass, weight: float) -> torch.Tensor | float:
        if name not in results:
            # No block was perturbed, so that pass would have repeated `cond`.
            return 0.0 if name == Pass.PERTURBED else weight * cond
        return weight * (cond - results[name].float())

    guided = (
        cond
        + term(Pass.UNCOND, g.cfg_scale - 1)
        + term(Pass.PERTURBED, g.stg_scale)
        + term(Pass.ISOLATED, g.modality_scale - 1)
    )
    if g.rescale_scale != 0:
        factor = cond.std() / guided.std()
        guided = guided * (g.rescale_scale * factor + (1 - g.rescale_scale))
    return guided.to(results[Pass.COND].dtype)


def run_one_by_one(
    names: tuple[Pass, ...], run: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
) -> dict[Pass, AV[torch.Tensor]]:
    """Run all passes on this rank, one after the other (a RunPasses)."""
    return {name: run(name) for name in names}


def run_batched(
    names: tuple[Pass, ...], run: Callable[[str], AV[torch.Tensor]], like: AV[torch.Tensor]
) -> dict[Pass, AV[torch.Tensor]]:
    """Run all passes on this rank, the conditional and the unconditional one as a batch of two (a RunPasses)."""
    if not set(BATCHED) <= set(names):
        return run_one_by_one(names, run, like)
    both = run(BATCHED_PASS)
    batched = {name: both.map(lambda x, n=number: x[n : n + 1]) for number, name in enumerate(BATCHED)}
    return {name: batched[name] if name in batched else run(name) for name in names}


@dataclass
class GuidedDenoiser:
    """A denoiser for the samplers (sampler.Denoise): all passes of a call, combined for each stream.

    It keeps its last result, which a stream that skips a call uses again. `run_passes` may divide the passes over
    ranks.
    """

    run_pass: RunPass
    guidance: AV[Guidance]
    run_passes: RunPasses = run_one_by_one
    _last: AV[torch.Tensor] | None = field(default=None, init=False)

    def __call__(self, latents: AV[torch.Tensor], sigma: torch.Tensor, step_index: int) -> AV[torch.Tensor]:
        skipped = self.guidance.map(lambda g: skips(g, step_index))
        if not (skipped.video and skipped.audio):
            enabled = skipped.map(lambda skip: not skip)
            names = passes_for(g for g, on in zip(self.guidance, enabled, strict=True) if on)
            # The reference copies the latents for its passes, and the copy is contiguous. All passes get the same ones.
            latents = latents.map(lambda x: x.contiguous())
            results = self.run_passes(names, lambda name: self.run_pass(name, latents, sigma, enabled), latents)
            by_stream = AV(
                {name: result.video for name, result in results.items()},
                {name: result.audio for name, result in results.items()},
            )
            # Step 0 is never skipped, so a stream that skips has a last result. In the first call this is unused.
            last = by_stream.map(lambda results: results[Pass.COND]) if self._last is None else self._last
            self._last = self.guidance.map(
                lambda g, results, skip, x0: x0 if skip else combine(g, results), by_stream, skipped, last
            )
        assert self._last is not None
        return self._last
