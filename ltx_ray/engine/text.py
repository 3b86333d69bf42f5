"""The text engine: prompts through Gemma and the connectors, and images through the video encoder.

Every prompt is encoded alone, padded to one fixed size, so that its context does not depend on the prompts beside it.
Source: docs/ltx-2.3.md#text; `tokenizer.py`, `encoders/base_encoder.py` and `embeddings_processor.py` in
`ltx_core/text_encoders/gemma/` of the reference v1.2.0.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch

from ltx_ray.checkpoints.checkpoint import gemma_folders
from ltx_ray.checkpoints.node_cache import on_this_node
from ltx_ray.config import EngineSpec
from ltx_ray.engine import codec, components
from ltx_ray.engine.base import PartSeconds, Rank, resolve_dtype
from ltx_ray.engine.evidence import FileDigests, evidence
from ltx_ray.engine.images import image_pixels
from ltx_ray.engine.negative_context import packed
from ltx_ray.records import (
    AV,
    Conditions,
    EngineFacts,
    Evidence,
    ImageLatents,
    ModelError,
    Negative,
    NotFinite,
    PromptContext,
    RowError,
    WorkItem,
)
from ltx_ray.sampling.passes import needs_negative
from ltx_ray.shapes import ClipShape
from ltx_ray.stages import Stage
from ltx_ray.storage.images import read_image
from ltx_ray.storage.pictures import InvalidImage

#: Prompts whose contexts are cached. The negative prompt is usually the same for all rows.
_CACHED_PROMPTS = 16
#: The prompt of the known-answer clip.
_KNOWN_PROMPT = "a lighthouse at dawn"


class TextEngine:
    """Gemma's text model, the text projections and both connectors, and the video encoder once a row has images."""

    def __init__(self, spec: EngineSpec, rank: Rank):
        self.spec, self.rank = spec, rank
        self.device = torch.device(rank.device)
        self.dtype = resolve_dtype(spec.numerics.dtype)
        self.facts = EngineFacts()
        self._encoder: torch.nn.Module | None = None
        self._contexts: OrderedDict[str, PromptContext] = OrderedDict()

    def load(self) -> None:
        """Load all but the video encoder. Raises ValueError naming what the files lack."""
        parts = PartSeconds()
        with parts.measure("transformers"):
            from transformers import AutoTokenizer, Gemma3ForConditionalGeneration

        model = on_this_node(self.spec.model)
        self._files = FileDigests(self.spec, "checkpoint_path", "gemma_root")
        weights, tokenizer = gemma_folders(model.gemma_root)
        # Files of a model are never run. By default transformers would ask, and read a pickle where nothing else is.
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        with parts.measure("read"):
            # With output_loading_info the method returns two values, which its annotation does not say.
            loaded: Any = Gemma3ForConditionalGeneration.from_pretrained(
                weights, dtype=self.dtype, output_loading_info=True, use_safetensors=True
            )
        whole, report = loaded
        # Transformers initialises weights that it does not find with random numbers.
        if missing := sorted(key for key in report["missing_keys"] if "language_model" in key):
            raise ValueError(f"{weights}: Gemma: {len(missing)} missing keys: {', '.join(missing[:10])}")
        # The vision tower is never used.
        with parts.measure("to the device"):
            self.gemma = whole.model.language_model.eval().to(self.device)
        del whole, loaded
        with parts.measure("connectors"):
            self.connectors = components.load_connectors(model.checkpoint_path, self.dtype, self.device)
        self.facts = EngineFacts(start_seconds=parts.take())

    @torch.inference_mode()
    def evidence(self) -> Evidence:
        """What this rank computes with, and the contexts of a prompt. Raises ReplicaError when they are not finite."""
        context = self.encode(_KNOWN_PROMPT).context
        del self._contexts[_KNOWN_PROMPT]
        return evidence(self._files, self.device, {"text": context})

    @torch.inference_mode()
    def run(self, stage: Stage, item: WorkItem) -> Conditions:
        """Contexts of the item's prompts and its encoded images.

        The negative context is there only when a pass needs it, and as `item.negative` says.

        Raises RowError for images that cannot be decoded or have changed since the run was planned, OSError when their
        store does not answer, ModelError when the video encoder's weights do not fit, NotFinite for contexts that are
        not finite.
        """
        request = item.request
        images = self._images(item)  # First, so that an image that cannot be used costs no pass of Gemma.
        negative = self.encode(request.negative_prompt) if needs_negative(request) else None
        positive = self.encode(request.prompt)
        _check_finite(request.prompt, positive)
        if negative is not None:
            _check_finite(request.negative_prompt, negative)
        truncated = positive.truncated or (negative is not None and negative.truncated)
        separate = packed(negative) if negative is not None and item.negative == Negative.SEPARATE else None
        self.facts = EngineFacts(prompt_truncated=truncated, negative=separate)
        return Conditions(positive, negative if item.negative == Negative.WITHIN else None, images)

    def _images(self, item: WorkItem) -> tuple[ImageLatents, ...]:
        latents = []
        for image, digest in zip(item.request.images, item.image_digests, strict=True):
            data = read_planned_image(image.path, digest)

            def encoded(shape: ClipShape, data: bytes = data, crf: int = image.crf or 0) -> torch.Tensor:
                pixels = image_pixels(data, crf, shape.height, shape.width, self.device).to(self.dtype)
                return codec.encode_video(self._video_encoder(), pixels).cpu()

            shape = item.request.shape
            try:
                stage1, stage2 = encoded(shape.half()), encoded(shape)
            except InvalidImage as error:
                raise RowError(f"images: {image.path} cannot be decoded ({error})") from None
            latents.append(ImageLatents(image.frame_idx, image.strength, stage1, stage2))
        return tuple(latents)

    def _video_encoder(self) -> torch.nn.Module:
        """The video encoder, loaded for the first image: it takes half a gigabyte, which text alone never needs."""
        if self._encoder is None:
            path = on_this_node(self.spec.model).checkpoint_path
            try:
                self._encoder = components.load_video_vae(path, self.dtype, self.device, part="encoder")
            except ValueError as error:
                raise ModelError(str(error)) from error  # No row is to blame.
        return self._encoder

    def encode(self, text: str) -> PromptContext:
        """Context of one prompt: (1, S, D_video) and (1, S, D_audio) on the host, where S is the padded size."""
        if text in self._contexts:
            self._contexts.move_to_end(text)
            return self._contexts[text]
        ids, mask, truncated = self.tokenize(text)
        hidden = self.gemma(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
        ).hidden_states
        video, audio = codec.encode_connectors(self.connectors, hidden, mask.to(self.device))
        context = PromptContext(AV(video.cpu(), audio.cpu()), tokens=int(mask.sum()), truncated=truncated)
        self._contexts[text] = context
        if len(self._contexts) > _CACHED_PROMPTS:
            self._contexts.popitem(last=False)
        return context

    def tokenize(self, text: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(ids (1, S), mask (1, S), whether the prompt was cut). Stripped, one leading <bos>, padded on the left."""
        size = self.spec.numerics.text_tokens
        all_ids = self.tokenizer(text.strip(), padding=False, truncation=False).input_ids
        bos = self.tokenizer.bos_token_id
        if not all_ids or all_ids[0] != bos:
            all_ids = [bos, *all_ids]
        ids = all_ids[:size]
        padding = size - len(ids)
        padded = [self.tokenizer.pad_token_id] * padding + ids
        mask = [0] * padding + [1] * len(ids)
        return torch.tensor([padded]), torch.tensor([mask]), len(all_ids) > size


def read_planned_image(path: str, digest: str) -> bytes:
    """The bytes of an image, which must have the `digest` that the plan recorded.

    Raises RowError when they do not, OSError when the store does not answer or refuses this node.
    """
    try:
        data = read_image(path)
    except ValueError as error:
        raise RowError(f"images: {path} cannot be read ({error})") from None
    except OSError as error:
        raise OSError(f"images: {path} cannot be read here ({error})") from None
    if hashlib.sha256(data).hexdigest()[:32] != digest:
        raise RowError(f"images: {path} has changed since the run was planned")
    return data


def _check_finite(prompt: str, context: PromptContext) -> None:
    bad = sum(int((~torch.isfinite(values)).sum()) for values in context.context)
    if bad:
        raise NotFinite(f"{bad} numbers of the context of {prompt[:60]!r} are not finite")
