"""A call of stage 1 as the samplers make it: all guidance passes of a pipeline's defaults, and their combination."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from ltx_ray.engine.initial_state import LatentState
from ltx_ray.engine.stage_model import Dit, StageModel, pass_perturbations, run_divided
from ltx_ray.model.transformer import Prefix
from ltx_ray.parallel.mesh import Mesh
from ltx_ray.presets import PIPELINES as PRESETS
from ltx_ray.records import AV, Guidance
from ltx_ray.sampling.guidance import BATCHED_PASS, GuidedDenoiser, run_batched
from ltx_ray.sampling.passes import Pass
from scripts.bench.dit_implementations import SIGMA, Case

#: Pipelines with guidance. That of `base` perturbs blocks (STG).
PIPELINES = ("hq", "base")


class _WholePasses(StageModel):
    """Runs the perturbed pass from its first block on."""

    def _prefix_of(self, *_: Any) -> Prefix | None:
        return None


def guided_call(
    case: Case, dit: Dit, pipeline: str, mesh: Mesh, shared_prefix: bool = True
) -> Callable[[], AV[torch.Tensor]]:
    """A call with two prompts. Without `shared_prefix` the perturbed pass computes its first blocks again."""
    guidance = AV("video", "audio").map(lambda stream: _defaults(PRESETS[pipeline].defaults, stream, case))
    state = LatentState(
        case.latents, torch.zeros_like(case.latents.video), None, case.positions, case.shape.video_tokens
    )
    negative = case.contexts.map(lambda x: x.flip(1))
    contexts: dict[str, AV[torch.Tensor]] = {Pass.COND: case.contexts, Pass.UNCOND: negative}
    contexts[BATCHED_PASS] = case.contexts.map(lambda a, b: torch.cat((a, b)), negative)
    kind = StageModel if shared_prefix else _WholePasses
    model = kind(dit, state, contexts, pass_perturbations(guidance), case.dtype, mesh.tokens)
    run_passes = run_divided(mesh.passes) if mesh.passes.size > 1 else run_batched

    def call() -> AV[torch.Tensor]:
        # A denoiser's first call, at a noise level of its own, so that nothing is reused.
        return GuidedDenoiser(model.run_pass, guidance, run_passes)(case.latents, torch.tensor(SIGMA), 0)

    return call


def _defaults(defaults: Mapping[str, Any], stream: str, case: Case) -> Guidance:
    values = {field.name: defaults[f"{stream}_{field.name}"] for field in fields(Guidance)}
    # A model of fewer layers perturbs its middle block instead of the 29th of 48.
    layers = case.config.num_layers
    values["stg_blocks"] = tuple(block * layers // 48 for block in values["stg_blocks"])
    return Guidance(**values)
