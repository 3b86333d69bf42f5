"""Training steps of the miniature that are recorded as CUDA graphs, beside the same steps launched kernel by kernel."""

from __future__ import annotations

import pytest
import torch

from ltx_ray.miniature import export, gemma
from scripts.miniature_training.diffusion import SMOKE, Batches, KindLosses
from scripts.miniature_training.flow import TextAndDit
from scripts.miniature_training.graphs import RecordedLosses
from scripts.miniature_training.latent_pool import FrozenEncoders
from scripts.miniature_training.prompts import FrozenGemma, TrainingPrompts

DEVICE, DTYPE = "cuda", torch.bfloat16
VAE, SOUNDS = (export.WEIGHTS / f"{part}.safetensors" for part in ("vae", "audio"))
#: Relative L2 errors. Products may be summed in another order in a graph, and are rounded to bfloat16.
CLOSE = 0.02


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> TrainingPrompts:
    folder = tmp_path_factory.mktemp("gemma")
    gemma.write_gemma(folder)
    return TrainingPrompts(FrozenGemma(folder, DTYPE, DEVICE), SMOKE.scenes, SMOKE.others, 0)


def _taken_gradients(model: TextAndDit) -> torch.Tensor:
    """The gradients of all weights, which have none afterwards."""
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    for weight in model.parameters():
        weight.grad = None
    return found


def _launched(losses, inputs) -> dict[str, float]:
    """The losses. The weights get their gradients.

    No autograd graph outlives the call, because a later recording would reuse its nodes.
    """
    found = losses(*inputs)
    found["loss"].backward()
    return {name: float(value.detach()) for name, value in found.items()}


def test_replays_of_several_kinds_give_losses_and_gradients_of_their_own_inputs(prompts):
    """Kinds are recorded and replayed in turns, also after the weights have changed, in one pool of memory."""
    torch.manual_seed(0)
    model = TextAndDit(DTYPE).to(DEVICE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    losses = KindLosses(model, prompts, DEVICE)
    batches = Batches(SMOKE, prompts, FrozenEncoders(VAE, SOUNDS, DTYPE, DEVICE), 0)
    recorded = RecordedLosses(model.parameters())
    first, image, isolated = SMOKE.kinds
    seen = []
    for turn, kind in enumerate((first, image, first, isolated, image, first, first)):
        if turn == 5:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(0.9)
        inputs = batches.inputs(kind)
        found = {name: float(value) for name, value in recorded(kind, losses.of(kind), *inputs).items()}
        gradients = _taken_gradients(model)
        for name, value in _launched(losses.of(kind), inputs).items():
            assert found[name] == pytest.approx(value, rel=CLOSE, abs=1e-3), (turn, name)
        assert (gradients - _taken_gradients(model)).norm() <= CLOSE * gradients.norm(), turn
        seen.append(found["loss"])
    # Every turn had other inputs.
    assert len(set(seen)) == len(seen)
