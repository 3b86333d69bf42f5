"""What people ask about a dataset or a weight file, as lines of text."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, generation, read_config
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.safetensors import TensorInfo, read_header
from ltx_ray.checkpoints.transformer_keys import AUDIO_CONNECTOR_PREFIX, TRANSFORMER_PREFIX, VIDEO_CONNECTOR_PREFIX
from ltx_ray.dataset import layout
from ltx_ray.dataset.existing import list_existing
from ltx_ray.driver.progress import duration
from ltx_ray.storage.lease import holder
from ltx_ray.storage.store import Store

_PARTS = {
    VIDEO_CONNECTOR_PREFIX: "video connector",
    AUDIO_CONNECTOR_PREFIX: "audio connector",
    TRANSFORMER_PREFIX: "transformer",
    "text_embedding_projection.": "text projections",
    "vae.": "video VAE",
    "audio_vae.": "audio VAE",
    "vocoder.": "vocoder",
}


def status_lines(output: str) -> list[str]:
    """State of the newest run into `output`, counts, and what its replicas do. ValueError for no dataset."""
    store = Store(output)
    try:
        run = json.loads(store.read_bytes(layout.RUN_RECORD))
    except OSError:
        raise ValueError(f"{output}: no run.json; legal: the --output of a run") from None
    except ValueError:
        run = {}
    if not isinstance(run, dict):
        run = {}
    done = list_existing(store)
    kinds = done.failed_kinds
    lines = [
        f"run {run.get('run_id', '?')}: {_state(run, store)}",
        f"manifest {run.get('manifest', '?')}, started {run.get('started_at', '?')}",
        f"{done.row_count} rows in the index, {done.failed_count} in failed/"
        + (f" ({kinds['illegal']} illegal, {kinds['row']} of their own fault, {kinds['infra']} of infrastructure's)"
           if done.failed_count else "")
        + (f", {done.preview_count} previews" if done.preview_count else ""),
    ]  # fmt: skip
    events = _events(store)
    if events:
        calls: dict[str, tuple[float, str]] = {}
        for event in events:
            if event.get("event") == "call":
                calls[event["replica"]] = (event["t"], f"{event['stage']} of {event['id']}, {event['seconds']:.1f} s")
            elif event.get("event") == "gang_lost":
                calls.pop(event["replica"], None)
        now = time.time()
        for replica, (when, what) in sorted(calls.items()):
            lines.append(f"{replica}: last finished {what}, {duration(now - when)} ago")
        finished = [e["t"] for e in events if e.get("event") == "item_finished"]
        if len(finished) > 1 and finished[-1] > finished[0]:
            lines.append(f"{(len(finished) - 1) / (finished[-1] - finished[0]) * 3600:,.0f} clips an hour")
    return lines


def _state(run: dict, store: Store) -> str:
    state = run.get("state", "unknown")
    if state in ("running", "draining") and holder(store) is None:
        return "interrupted (run the same command to go on)"
    return state


def _events(store: Store) -> list[dict]:
    try:
        text = store.read_bytes(layout.EVENTS).decode(errors="replace")
    except OSError:
        return []
    events = []
    for line in text.splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue  # the last line of a running log may be half-written
    return [e for e in events if isinstance(e, dict) and "t" in e]


def inspect_lines(path: str) -> list[str]:
    """Parts, sizes and metadata of the safetensors file or the model directory at `path`. ValueError for neither."""
    if os.path.isdir(path):
        return _directory_lines(path)
    header = read_header(path)
    lines = [f"{path}: {header.size / 2**20:,.1f} MiB, {_kinds(header.tensors.values())}"]
    if version := header.metadata.get("model_version"):
        lines.append(f"model_version {version}")
    claimed: set[str] = set()
    for prefix, what in _PARTS.items():
        names = {n for n in header.tensors if n.startswith(prefix)} - claimed
        claimed |= names
        if names:
            size = sum(header.tensors[n].nbytes for n in names)
            lines.append(f"{what}: {len(names)} tensors, {size / 2**20:,.1f} MiB under {prefix}")
    if any("lora" in name for name in header.tensors):
        pairs = open_lora(path).pairs
        ranks = Counter(pair.rank for pair in pairs.values())
        shown = ", ".join(f"{n} of rank {rank}" for rank, n in ranks.most_common(4))
        scales = Counter(f"{pair.scale:g}" for pair in pairs.values() if pair.scale != 1.0)
        scaled = "".join(f", {n} scaled by {scale} (alpha / rank)" for scale, n in scales.most_common(4))
        lines.append(f"LoRA: {len(pairs)} modules ({shown}{scaled}), such as {next(iter(pairs))}")
        claimed = set(header.tensors)
    rest = set(header.tensors) - claimed
    if rest:
        lines.append(f"other: {len(rest)} tensors, such as {', '.join(sorted(rest)[:5])}")
    transformer = header.config.get("transformer")
    if transformer:
        lines.append(_architecture(transformer))
    elif header.config:
        lines.append(f"config: {json.dumps(header.config)[:200]}")
    return lines


def _directory_lines(path: str) -> list[str]:
    """The folders of a model in diffusers' layout, or the one that `path` is."""
    inside = sorted(entry.path for entry in os.scandir(path) if os.path.isfile(os.path.join(entry.path, "config.json")))
    folders = [path] if os.path.isfile(os.path.join(path, "config.json")) else inside
    if not folders:
        raise ValueError(f"{path}: no folder in it has a config.json; legal: a model directory, or a safetensors file")
    lines = [f"{path}: a model directory"]
    for folder in folders:
        config = read_config(folder)
        files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
        tensors = [info for name in files for info in read_header(os.path.join(folder, name)).tensors.values()]
        size = sum(info.nbytes for info in tensors) / 2**20
        what = config.get("_class_name") or config.get("model_type", "?")
        name = os.path.basename(os.path.normpath(folder))
        stored = f"{size:,.1f} MiB in {len(files)} file{'s' if len(files) != 1 else ''}"
        lines.append(f"{name}: {what}, {stored}, {_kinds(tensors)}")
        if what == COMPONENTS["transformer"]:
            version, why = generation(config)
            lines.append(f"model_version {version}{' (' + why + ')' if why else ''}")
            lines.append(_architecture(config))
    return lines


def _kinds(tensors: Iterable[TensorInfo]) -> str:
    dtypes = Counter(info.dtype for info in tensors)
    return f"{dtypes.total()} tensors ({', '.join(f'{n} {dtype}' for dtype, n in dtypes.most_common())})"


def _architecture(config: Mapping[str, Any]) -> str:
    return (
        f"transformer: {config.get('num_layers')} layers, {config.get('num_attention_heads')} heads of "
        f"{config.get('attention_head_dim')} (video) and {config.get('audio_attention_head_dim')} (audio)"
    )
