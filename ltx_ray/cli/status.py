"""The lines of `ltx-ray status` and of `ltx-ray inspect`."""

from __future__ import annotations

import json
import posixpath
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_ray.checkpoints.diffusers_layout import COMPONENTS, generation, read_config
from ltx_ray.checkpoints.lora import open_lora
from ltx_ray.checkpoints.model_paths import is_file, is_folder, names
from ltx_ray.checkpoints.safetensors import SafetensorsHeader, TensorInfo, read_header
from ltx_ray.checkpoints.transformer_keys import AUDIO_CONNECTOR_PREFIX, TRANSFORMER_PREFIX, VIDEO_CONNECTOR_PREFIX
from ltx_ray.dataset import layout
from ltx_ray.dataset.clip_rate import UNFINISHED, rate_text
from ltx_ray.dataset.existing import ExistingRows, list_existing
from ltx_ray.dataset.gpu_time import read_gpu_seconds
from ltx_ray.dataset.quality import quality_text
from ltx_ray.dataset.run_cost import cost_lines, recorded_cost
from ltx_ray.dataset.run_summary import LastCall, RecordedRun, read_run, rows_text, wait_lines
from ltx_ray.driver.progress import duration
from ltx_ray.records import plain
from ltx_ray.storage.lease import holder
from ltx_ray.storage.locations import join, split_options
from ltx_ray.storage.store import Store

_MIB = 2**20
#: Parts of a single file by the prefixes of their tensors. A tensor belongs to the first prefix that fits.
_PARTS_OF_FILE = {
    VIDEO_CONNECTOR_PREFIX: "video connector",
    AUDIO_CONNECTOR_PREFIX: "audio connector",
    TRANSFORMER_PREFIX: "transformer",
    "text_embedding_projection.": "text projections",
    "vae.": "video VAE",
    "audio_vae.": "audio VAE",
    "vocoder.": "vocoder",
}


# --- status ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """The newest run into an output, and what the output holds. `record` is its `run.json`."""

    record: Mapping[str, Any]
    interrupted: bool
    known: RecordedRun
    existing: ExistingRows
    #: Seconds for which all runs have reserved GPUs.
    gpu_seconds: float


def read_status(output: str) -> Status:
    """Raises ValueError for no dataset."""
    store = Store(output)
    try:
        run = json.loads(store.read_bytes(layout.RUN_RECORD))
    except OSError:
        raise ValueError(f"{store.name}: no run.json; legal: the --output of a run") from None
    except ValueError:
        run = {}
    if not isinstance(run, dict):
        run = {}
    interrupted = run.get("state") in UNFINISHED and holder(store) is None
    known = read_run(store, run, None if interrupted else time.time())
    return Status(run, interrupted, known, list_existing(store), read_gpu_seconds(store))


def status_lines(output: str) -> list[str]:
    """The state of the newest run into `output`, its counts, and its replicas. Raises ValueError for no dataset."""
    status = read_status(output)
    run, known, interrupted = status.record, status.known, status.interrupted
    rate = known.clips_per_hour
    return [
        f"run {run.get('run_id', '?')}: {_state(run, interrupted)}",
        f"manifest {run.get('manifest', '?')}, started {run.get('started_at', '?')}",
        *([rows_text(run)] if isinstance(run.get("counts"), dict) else ()),
        _counts(status.existing),
        *_replica_lines(known.replicas),
        *wait_lines(known.waits),
        *known.odd_nodes,
        *([f"clips of the run: {text}"] if (text := quality_text(run.get("quality"))) else ()),
        *cost_lines(run, status.gpu_seconds),
        *([rate_text(rate) + (" when it was interrupted" if interrupted else "")] if rate else ()),
    ]


def status_json(output: str) -> str:
    """The same for programs: one JSON object. What is not known is null. Raises ValueError for no dataset."""
    status = read_status(output)
    run, known, existing = status.record, status.known, status.existing
    cost, kinds = recorded_cost(run), existing.failed_kinds
    fields = {
        **{name: run.get(name) for name in ("run_id", "manifest", "output", "started_at", "finished_at")},
        "state": "interrupted" if status.interrupted else run.get("state"),
        "counts": run.get("counts"),
        "expected_rows": run.get("expected_rows"),
        "rows": {
            "index": existing.row_count - existing.pending_count,
            "not_folded": existing.pending_count,
            "previews": existing.preview_count,
            "removed": len(existing.removed.items),
            "failed": {
                layout.ILLEGAL: kinds[layout.ILLEGAL],
                layout.ROW: kinds[layout.ROW],
                layout.INFRASTRUCTURE: kinds[layout.INFRASTRUCTURE] + kinds[layout.UNREAD],
            },
        },
        "clips_per_hour": known.clips_per_hour,
        "cost": None if cost is None else plain(cost),
        "gpu_hours_of_all_runs": status.gpu_seconds / 3600,
        "quality": run.get("quality"),
        "waits": known.waits,
        "odd_nodes": known.odd_nodes,
        "replicas": {name: plain(call) for name, call in known.replicas.items()},
    }
    return json.dumps(fields, ensure_ascii=False)


def _state(run: Mapping[str, Any], interrupted: bool) -> str:
    return "interrupted (run the same command to resume)" if interrupted else str(run.get("state", "unknown"))


def _counts(existing: ExistingRows) -> str:
    pending = existing.pending_count
    line = f"{existing.row_count - pending} rows in the index, "
    if pending:
        line += f"{pending} finished and not yet folded, "
    line += f"{existing.failed_count} in failed/"
    if existing.failed_count:
        kinds = existing.failed_kinds
        line += (
            f" ({kinds[layout.ILLEGAL]} illegal, {kinds[layout.ROW]} of their own fault, "
            f"{kinds[layout.INFRASTRUCTURE] + kinds[layout.UNREAD]} of infrastructure's)"
        )
    if existing.removed.items:
        line += f", {len(existing.removed.items)} clips taken down"
    if existing.preview_count:
        line += f", {existing.preview_count} previews"
    return line


def _replica_lines(replicas: Mapping[str, LastCall]) -> Iterator[str]:
    """The last call of each replica that has not ended since."""
    now = time.time()
    for replica, call in sorted(replicas.items()):
        finished = f"{call.stage} of {call.id}, {call.seconds:.1f} s"
        yield f"{replica}: last finished {finished}, {duration(now - call.t)} ago"


# --- inspect -----------------------------------------------------------------------------------------------------


def inspect_lines(path: str) -> list[str]:
    """Parts, sizes and metadata of the safetensors file or the model directory at `path`; ValueError for neither."""
    if is_folder(path):
        return _directory_lines(path)
    header = read_header(path)
    lines = [f"{path}: {header.size / _MIB:,.1f} MiB, {_dtypes(header.tensors.values())}"]
    if version := header.metadata.get("model_version"):
        lines.append(f"model_version {version}")
    described: set[str] = set()
    for prefix, part in _PARTS_OF_FILE.items():
        own = {name for name in header.tensors if name.startswith(prefix)} - described
        described |= own
        if own:
            size = sum(header.tensors[name].nbytes for name in own)
            lines.append(f"{part}: {len(own)} tensors, {size / _MIB:,.1f} MiB under {prefix}")
    if any("lora" in name for name in header.tensors):
        lines.append(_lora_line(path))
        described = set(header.tensors)
    if rest := set(header.tensors) - described:
        lines.append(f"other: {len(rest)} tensors, such as {', '.join(sorted(rest)[:5])}")
    return lines + _config_lines(header)


def _lora_line(path: str) -> str:
    pairs = open_lora(path).pairs
    ranks = Counter(pair.rank for pair in pairs.values())
    scales = Counter(f"{pair.scale:g}" for pair in pairs.values() if pair.scale != 1.0)
    shown = ", ".join(f"{count} of rank {rank}" for rank, count in ranks.most_common(4))
    scaled = "".join(f", {count} scaled by {scale} (alpha / rank)" for scale, count in scales.most_common(4))
    return f"LoRA: {len(pairs)} modules ({shown}{scaled}), such as {next(iter(pairs))}"


def _config_lines(header: SafetensorsHeader) -> list[str]:
    if isinstance(transformer := header.config.get("transformer"), dict) and transformer:
        return [_architecture(transformer)]
    return [f"config: {json.dumps(header.config)[:200]}"] if header.config else []


def _directory_lines(path: str) -> list[str]:
    """The folders of a model in diffusers' layout, or the only one when `path` is such a folder itself."""
    inside = [folder for name in names(path) if is_file(join(folder := join(path, name), "config.json"))]
    folders = [path] if is_file(join(path, "config.json")) else inside
    if not folders:
        raise ValueError(f"{path}: no folder in it has a config.json; legal: a model directory, or a safetensors file")
    return [f"{path}: a model directory", *(line for folder in folders for line in _folder_lines(folder))]


def _folder_lines(folder: str) -> Iterator[str]:
    config = read_config(folder)
    files = [name for name in names(folder) if name.endswith(".safetensors")]
    tensors = [info for name in files for info in read_header(join(folder, name)).tensors.values()]
    size = sum(info.nbytes for info in tensors) / _MIB
    component = config.get("_class_name") or config.get("model_type", "?")
    name = posixpath.basename(split_options(folder)[0].rstrip("/"))
    stored = f"{size:,.1f} MiB in {len(files)} file{'s' if len(files) != 1 else ''}"
    yield f"{name}: {component}, {stored}, {_dtypes(tensors)}"
    if component == COMPONENTS["transformer"]:
        version, why = generation(config)
        yield f"model_version {version}{' (' + why + ')' if why else ''}"
        yield _architecture(config)


def _dtypes(tensors: Iterable[TensorInfo]) -> str:
    dtypes = Counter(info.dtype for info in tensors)
    return f"{dtypes.total()} tensors ({', '.join(f'{count} {dtype}' for dtype, count in dtypes.most_common())})"


def _architecture(config: Mapping[str, Any]) -> str:
    return (
        f"transformer: {config.get('num_layers')} layers, {config.get('num_attention_heads')} heads of "
        f"{config.get('attention_head_dim')} (video) and {config.get('audio_attention_head_dim')} (audio)"
    )
