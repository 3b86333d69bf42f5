"""A clip's latents outside the pools: their names, their digest, and the file from which a later run can continue.

`latents/<2 hex>/<item_id>.safetensors` holds stage_1.video, stage_1.audio and, where there is a second stage, its two.
The metadata has the item_id, the noise ledger after stage 1, the numerics, the model of the GPU and the version of
ltx-ray that computed them, and a digest of each stage's latents, which is checked on reading.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

import ltx_ray
from ltx_ray.checkpoints.digests import cache_root
from ltx_ray.dataset.layout import latents_path
from ltx_ray.engine.initial_state import stage1_draws
from ltx_ray.engine.patchify import latent_sizes
from ltx_ray.records import AV, NoiseLedger, StageLatents, StoredLatentsGone, WorkItem, canonical_json
from ltx_ray.storage.locations import join
from ltx_ray.storage.store import Store

_log = logging.getLogger(__name__)


def named_latents(*stages: StageLatents) -> dict[str, torch.Tensor]:
    """`stage_1.video`, `stage_1.audio`, `stage_2.video`, ... in the order in which they were computed."""
    return {
        f"stage_{n}.{name}": tensor
        for n, stage in enumerate(stages, start=1)
        for name, tensor in zip(("video", "audio"), stage.latents, strict=True)
    }


def latents_sha256(named: dict[str, torch.Tensor]) -> str:
    """sha256 over each latent's name, dtype, shape and raw little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in named.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}:{dtype}:{tuple(tensor.shape)}:".encode())
        # A contiguous tensor of one token may have any stride along its axes of size 1. Flattened, it has none of them.
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LatentStore:
    """Latents in the output, and in this node's cache while the output cannot be written.

    A file with both stages is never replaced by one with the first stage alone, in either place. One from which no run
    can continue counts as none.
    """

    def __init__(self, output: Store):
        self.output = output
        folder = hashlib.sha256(output.name.encode()).hexdigest()[:12]
        self.node_cache = Store(str(cache_root() / "kept" / folder))
        #: Whether the latents that were loaded last had no digest.
        self.unchecked = False

    def publish(self, item: WorkItem, stages: Sequence[StageLatents]) -> str:
        """Write the latents of `stages` to the output, and return where they are. Raises OSError when it refuses."""
        location = _write(self.output, item, stages)
        if _stored_stages(self.node_cache, item, _dtype_of(stages)) <= len(stages):
            self.delete_cached(item)
        return location

    def save(self, item: WorkItem, stages: Sequence[StageLatents]) -> str:
        """`publish`, or write to the node's cache when the output refuses. Raises OSError when both refuse."""
        try:
            return self.publish(item, stages)
        except OSError as error:
            _log.warning("%s: the output cannot be written (%s); its latents stay on this node", item.item_id, error)
        return _write(self.node_cache, item, stages)

    def delete_cached(self, item: WorkItem) -> None:
        """Remove the copy in this node's cache, if there is one."""
        self.node_cache.delete(latents_path(item.item_id))

    def holds_both_stages(self, item: WorkItem, dtype: torch.dtype) -> bool:
        """Whether the output has latents of both stages of `item`, in `dtype`."""
        return _stored_stages(self.output, item, dtype) > 1

    def load_stage1(self, item: WorkItem, dtype: torch.dtype) -> tuple[StageLatents, str]:
        """Stored stage-1 latents of `item` and where they were: in the output, or else in the node's cache.

        Raises StoredLatentsGone when neither has a file of this item with finite latents of the item's sizes in
        `dtype`, with the ledger of their noise, and with the digest in the metadata. Files of older versions have no
        digest and are taken as they are, which `unchecked` then says.
        """
        reasons = []
        for store in (self.output, self.node_cache):
            location = join(store.name, latents_path(item.item_id))
            try:
                latents, checked = _load_stage1(store, item, dtype)
                self.unchecked = not checked
                return latents, location
            except FileNotFoundError:
                reasons.append(f"{location}: no such file")
            except (OSError, ValueError) as error:
                reasons.append(f"{location}: {error}")
        raise StoredLatentsGone("; ".join(reasons))


def _write(store: Store, item: WorkItem, stages: Sequence[StageLatents]) -> str:
    location = join(store.name, latents_path(item.item_id))
    if len(stages) == 1 and _stored_stages(store, item, _dtype_of(stages)) > 1:
        return location
    named = {name: tensor.contiguous() for name, tensor in named_latents(*stages).items()}
    metadata = {
        "item_id": item.item_id,
        "noise_ledger": canonical_json(stages[0].ledger),
        "numerics": stages[0].numerics,
        "device_name": stages[0].device_name,
        "ltx_ray": ltx_ray.__version__,
        **{_digest_field(stage): latents_sha256(_of_stage(named, stage)) for stage in range(1, len(stages) + 1)},
    }
    store.write_bytes(latents_path(item.item_id), save(named, metadata))
    return location


def _digest_field(stage: int) -> str:
    """The metadata field with the digest of a stage's latents."""
    return f"stage_{stage}.sha256"


def _of_stage(named: Mapping[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
    """The latents of one stage, in the order in which their digest takes them."""
    names = (f"stage_{stage}.video", f"stage_{stage}.audio")
    return {name: named[name] for name in names if name in named}


def _dtype_of(stages: Sequence[StageLatents]) -> torch.dtype:
    return stages[0].latents.video.dtype


def _stored_stages(store: Store, item: WorkItem, dtype: torch.dtype) -> int:
    """How many stages the item's file has; 0 when there is no file, or none from which a run can continue."""
    try:
        metadata, tensors = _load(store, item)
        _stage1_of(metadata, tensors, item, dtype)
    except (FileNotFoundError, ValueError):
        return 0
    return 1 + (len(_of_stage(tensors, 2)) == 2)


def _load(store: Store, item: WorkItem) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of the item's file. Raises OSError, and ValueError for a broken file or another item's."""
    data = store.read_bytes(latents_path(item.item_id))
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file ({error})") from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__") or {}
    if metadata.get("item_id") != item.item_id:
        raise ValueError(f"holds item {metadata.get('item_id')}")
    for stage in (1, 2):
        digest, found = metadata.get(_digest_field(stage)), _of_stage(tensors, stage)
        if digest is not None and len(found) == 2 and latents_sha256(found) != digest:
            raise ValueError(f"the latents of stage {stage} are not those that were written (their digest differs)")
    return metadata, tensors


def _load_stage1(store: Store, item: WorkItem, dtype: torch.dtype) -> tuple[StageLatents, bool]:
    """The latents of stage 1 in the item's file, and whether they have a digest. Raises as `_load` and `_stage1_of`."""
    metadata, tensors = _load(store, item)
    return _stage1_of(metadata, tensors, item, dtype), _digest_field(1) in metadata


def _stage1_of(
    metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], item: WorkItem, dtype: torch.dtype
) -> StageLatents:
    """The latents of stage 1 in a file's `tensors`. Raises ValueError when stage 2 cannot continue them."""
    sizes = latent_sizes(item.request.shape.half())
    for name, size in zip(("stage_1.video", "stage_1.audio"), sizes, strict=True):
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"no {name}")
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {size}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
    ledger = _parse_ledger(metadata.get("noise_ledger"))
    draws = stage1_draws(item.request, str(dtype).removeprefix("torch."))
    if (ledger.seed, ledger.draws) != (item.request.seed, draws):
        raise ValueError("its noise ledger is not that of the item after stage 1")
    latents = AV(tensors["stage_1.video"], tensors["stage_1.audio"])
    numerics, device_name = _checked_numerics(metadata.get("numerics", "")), metadata.get("device_name", "")
    return StageLatents(latents, ledger, numerics, device_name)


def _parse_ledger(text: str | None) -> NoiseLedger:
    if text is None:
        raise ValueError("no noise ledger")
    try:
        found = json.loads(text)
        draws = tuple((name, tuple(shape), dtype) for name, shape, dtype in found["draws"])
        return NoiseLedger(found["seed"], found["device"], found["device_model"], draws)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its noise ledger cannot be read ({error!r})") from None


def _checked_numerics(text: str) -> str:
    """`text`, which the index repeats as JSON. "" where it is not known."""
    try:
        legal = not text or isinstance(json.loads(text), dict)
    except ValueError:
        legal = False
    if not legal:
        raise ValueError("its numerics cannot be read")
    return text
