"""The text engine: prompts through Gemma and the connectors.

Source: `tokenizer.py`, `base_encoder.py` and `embeddings_processor.py` of the reference v1.2.0. Every
prompt is encoded alone in one fixed padded size, so that its context never depends on its company.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ltx_ray.config import EngineSpec
from ltx_ray.engine import apply, components
from ltx_ray.engine.base import Rank, resolve_dtype
from ltx_ray.records import AV, PromptContext, WorkItem
from ltx_ray.sampling.passes import passes_for

#: Contexts kept: the negative prompt is usually the same for all rows.
_KEPT = 16


class TextEngine:
    """Gemma's text model, the text projections and both connectors."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self.info: dict[str, bool] = {}
        self._contexts: OrderedDict[str, PromptContext] = OrderedDict()

    def load(self) -> None:
        from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        model = self.spec.model.local()
        self.tokenizer = AutoTokenizer.from_pretrained(model.gemma_root)
        self.tokenizer.padding_side = "left"
        self.tokenizer.model_max_length = self.spec.numerics.text_tokens
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        whole = Gemma3ForConditionalGeneration.from_pretrained(model.gemma_root, dtype=self.dtype)
        # the vision tower is never used
        self.gemma = whole.model.language_model.eval().to(self.device)
        del whole
        self.connectors = components.load_connectors(model.checkpoint_path, self.dtype, self.device)

    @torch.inference_mode()
    def run(self, stage: str, item: WorkItem) -> tuple[PromptContext, PromptContext | None]:
        """(positive, negative) contexts of the item; negative is None when no pass needs it."""
        request = item.request
        negative = self.encode(request.negative_prompt) if "uncond" in passes_for(request.guidance) else None
        positive = self.encode(request.prompt)
        self.info = {"prompt_truncated": positive.truncated or (negative is not None and negative.truncated)}
        return positive, negative

    def encode(self, text: str) -> PromptContext:
        """Context of one prompt, (1, S, D_video) and (1, S, D_audio) on the host, S the padded size."""
        if text in self._contexts:
            self._contexts.move_to_end(text)
            return self._contexts[text]
        ids, mask, truncated = self.tokenize(text)
        hidden = self.gemma(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
        ).hidden_states
        video, audio = apply.encode_connectors(self.connectors, hidden, mask.to(self.device))
        context = PromptContext(AV(video.cpu(), audio.cpu()), tokens=int(mask.sum()), truncated=truncated)
        self._contexts[text] = context
        if len(self._contexts) > _KEPT:
            self._contexts.popitem(last=False)
        return context

    def tokenize(self, text: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(ids (1, S), mask (1, S), whether it was cut): stripped, one leading <bos>, padded on the left."""
        size = self.spec.numerics.text_tokens
        every = self.tokenizer(text.strip(), padding=False, truncation=False).input_ids
        bos = self.tokenizer.bos_token_id
        if not every or every[0] != bos:
            every = [bos, *every]
        ids = every[:size]
        padding = size - len(ids)
        padded = [self.tokenizer.pad_token_id] * padding + ids
        mask = [0] * padding + [1] * len(ids)
        return torch.tensor([padded]), torch.tensor([mask]), len(every) > size
