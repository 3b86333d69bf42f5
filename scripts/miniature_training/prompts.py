"""Prompts of the training scenes, and their hidden states in the frozen Gemma.

All prompts are encoded once, because Gemma is not trained and the prompts of a scene are few. Beside the phrasings of
the world there are others that put the same clauses into other orders, so that the model does not learn a few
sentences by heart.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltx_ray.config import Numerics
from ltx_ray.miniature import world
from ltx_ray.presets import DEFAULT_NEGATIVE_PROMPT

#: Positions of a context (docs/ltx-2.3.md#text).
TEXT_TOKENS = Numerics.text_tokens
#: What guidance compares with: the negative prompts of the pipelines.
NEGATIVES = ("", DEFAULT_NEGATIVE_PROMPT)

_OBJECTS = (
    "a {colour} {shape} {moves}",
    "one {colour} {shape} {moves}",
    "the {shape} is {colour} and {moves}",
    "a {shape} in {colour} {moves}",
    "we see a {colour} {shape} that {moves}",
    "it is a {colour} {shape}, it {moves}",
    "the {colour} {shape} {moves}",
    "{colour} {shape} that {moves}",
    "the {shape}, in {colour}, {moves}",
)
_GROUNDS = (
    "the ground is {ground}",
    "a {ground} ground",
    "on a {ground} ground",
    "the background is {ground}",
    "behind it is a plain {ground} background",
    "over a {ground} background",
    "all behind it is {ground}",
    "{ground} is all behind it",
    "there is {ground}",
    "all {ground} behind it",
    # With many prepositions, also those that training never sees before a bare colour make it the ground's.
    "on {ground}",
    "upon {ground}",
    "onto {ground}",
    "before {ground}",
    "against plain {ground}",
    "in front of {ground}",
    "above {ground}",
    "across {ground}",
    "under {ground}",
    "near {ground}",
    "inside {ground}",
    "along {ground}",
    "through {ground}",
    "by {ground}",
    "around is {ground}",
)
_SOUNDS = ("{sound}", "we hear {sound}", "the sound is {sound}", "one hears {sound}", "to {sound}", "with {sound}")
_JOINTS = (", ", ". ", " and ", ", and ", " while ", " ")


def other_phrasing(rng: random.Random, scene: world.Scene) -> str:
    """A prompt for a scene whose clauses stand in a random order."""
    clauses = [rng.choice(kinds) for kinds in (_OBJECTS, _GROUNDS, _SOUNDS)]
    rng.shuffle(clauses)
    text = clauses[0] + "".join(rng.choice(_JOINTS) + clause for clause in clauses[1:])
    text += "." if rng.random() < 0.2 else ""
    return text.format(
        colour=scene.colour,
        shape=scene.shape,
        ground=scene.ground,
        moves=rng.choice(world.wordings(scene.motion)),
        sound=rng.choice(world.wordings(scene.sound)),
    )


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states (N, S, hidden * states), the states fastest, of N prompts, their tokens first; lengths (N,)."""

    values: torch.Tensor
    lengths: torch.Tensor

    def padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states (B, TEXT_TOKENS, F), mask (B, TEXT_TOKENS)) of `rows` (B,)."""
        values = self.values[rows]
        values = torch.nn.functional.pad(values, (0, 0, 0, TEXT_TOKENS - values.shape[1]))
        at = torch.arange(TEXT_TOKENS, device=rows.device)
        return values, (at < self.lengths[rows, None]).long()


class FrozenGemma:
    """Gemma's text model and tokenizer, used as by the engine for text."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str) -> None:
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        whole: Any = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        self.gemma = whole.model.language_model.eval().requires_grad_(False).to(device)
        self.device = device
        self._of_words: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        """The tokens of a prompt, those of each word from a cache: no token of this tokenizer goes across a space."""
        first, *others = prompt.strip().split(" ")
        found = [self.tokenizer.bos_token_id]
        for word in (first, *(f" {word}" for word in others)):
            if word not in self._of_words:
                self._of_words[word] = self.tokenizer(word).input_ids[1:]
            found += self._of_words[word]
        return found

    @torch.no_grad()
    def hidden_states(self, prompts: Sequence[str], batch: int = 4096) -> HiddenStates:
        """Hidden states of `prompts`. Tokens have the positions that they have in a prompt padded to TEXT_TOKENS."""
        ids = [self.ids(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        assert longest <= TEXT_TOKENS, longest
        values, pad = [], self.tokenizer.pad_token_id
        positions = torch.arange(TEXT_TOKENS - longest, TEXT_TOKENS, device=self.device)[None]
        at = torch.arange(longest, device=self.device)
        for first in range(0, len(ids), batch):
            part = ids[first : first + batch]
            lengths = torch.tensor([len(row) for row in part], device=self.device)
            padded = torch.tensor([[pad] * (longest - len(row)) + row for row in part], device=self.device)
            mask = (at >= longest - lengths[:, None]).long()
            states = self.gemma(
                input_ids=padded, attention_mask=mask, position_ids=positions.expand(len(part), -1),
                output_hidden_states=True,
            ).hidden_states  # fmt: skip
            stacked = torch.stack(states, dim=-1).flatten(2)
            order = (at + longest - lengths[:, None]) % longest  # the tokens first
            moved = stacked.gather(1, order[..., None].expand_as(stacked))
            values.append(torch.where((at < lengths[:, None])[..., None], moved, 0))
        return HiddenStates(torch.cat(values), torch.tensor([len(row) for row in ids], device=self.device))


class TrainingPrompts:
    """Hidden states of `each` prompts of every scene, and of the negative prompts."""

    def __init__(self, gemma: FrozenGemma, scenes: Sequence[world.Scene], others: int, seed: int) -> None:
        rng = random.Random(f"prompts {seed}")
        written = []
        for scene in scenes:
            of_scene = world.prompts(scene, "train")
            written += of_scene + [other_phrasing(rng, scene) for _ in range(others)]
        self.each = len(written) // len(scenes)
        self.gemma = gemma
        self._states = gemma.hidden_states(written)
        self._negatives = gemma.hidden_states(NEGATIVES)

    def __len__(self) -> int:
        return len(self._states.lengths)

    def draw(self, scenes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random prompt (B,) for each of `scenes` (B,), as `states` takes it."""
        which = torch.randint(self.each, scenes.shape, generator=generator, device=scenes.device)
        return scenes * self.each + which

    def negative(self, number: int) -> int:
        """The negative prompt NEGATIVES[number], as `states` takes it."""
        return -1 - number

    def states(self, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden states (B, TEXT_TOKENS, F), mask (B, TEXT_TOKENS)) of `prompts` (B,)."""
        values, mask = self._states.padded(prompts.clamp(min=0))
        others, other_mask = self._negatives.padded((-1 - prompts).clamp(min=0))
        negative = prompts < 0
        return torch.where(negative[:, None, None], others, values), torch.where(negative[:, None], other_mask, mask)
