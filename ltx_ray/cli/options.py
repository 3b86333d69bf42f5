"""The options of the `ltx-ray` command: their names, and what is made of their values."""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path
from typing import Any

import typer
import yaml

from ltx_ray.checkpoints.checkpoint import held_by
from ltx_ray.config import LoraSpec, ModelFiles, RunLimits, Selection
from ltx_ray.manifest.columns import COLUMNS
from ltx_ray.placement.numerics import ATTENTION, COMPILE
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options

#: Models that `--model` knows: functions that make the files on any node.
_PROVIDERS = {"toy": "ltx_ray.toy:ensure_toy_model"}
#: Joins a LoRA's path and strength on their way through the option parser.
_JOINT = "\x1f"
_CHOICES = {
    "device": ("auto", "cuda", "cpu"),
    "dtype": ("bfloat16", "float32"),
    "precision": ("bf16", "fp8"),
    "attention": ATTENTION,
    "compile": COMPILE,
    "share_cards": ("auto", "on", "off"),
    "noise_device": ("model", "cpu"),
}


def _option(kind: Any, help_: str, *flags: str, default: Any = None, panel: str) -> tuple[Any, Any]:
    return kind, typer.Option(default, *flags, help=help_, rich_help_panel=panel, show_default=default is not None)


def model_options() -> dict[str, tuple[Any, Any]]:
    p = "Model"
    return {
        "model": _option(str | None, "toy: a tiny model with random weights, made on the spot", panel=p),
        "checkpoint_path": _option(str | None, "LTX-2.3 single file, or directory as diffusers writes it", panel=p),
        "distilled_checkpoint_path": _option(
            str | None,
            "LTX-2.3 distilled, file or directory, in place of --checkpoint-path (pipeline distilled)",
            panel=p,
        ),
        "gemma_root": _option(str | None, "Gemma 3 model directory (default: that in a checkpoint directory)", panel=p),
        "spatial_upsampler_path": _option(
            str | None, "latent upsampler x2, file or directory (default: that in a checkpoint directory)", panel=p
        ),
        "distilled_lora": _option(str | None, "distilled LoRA", panel=p),
        "lora": _option(
            list[str] | None, "a user LoRA and its default strength (repeatable): --lora PATH [STRENGTH]", panel=p
        ),
        "dtype": _option(str, "bfloat16 or float32", default="bfloat16", panel=p),
        "precision": _option(
            str, "linear layers of the DiT: bf16, or fp8 (faster, half the memory)", default="bf16", panel=p
        ),
        "noise_device": _option(str, "where noise is drawn: model or cpu", default="model", panel=p),
    }


def row_options() -> dict[str, tuple[Any, Any]]:
    options = {}
    for column in COLUMNS.values():
        if column.flag is None:
            continue
        kind: Any = str
        if column.type == COLUMNS["frame_rate"].type:
            kind = float
        elif column.type in (COLUMNS["seed"].type, COLUMNS["height"].type):
            kind = int
        help_ = f"default of the column {column.name}: {column.legal}"
        options[column.name] = _option(kind | None, help_, f"--{column.flag}", panel="Defaults of rows")
    return options


def selection_options() -> dict[str, tuple[Any, Any]]:
    p = "Rows"
    return {
        "limit": _option(int | None, "take the first N rows of the manifest, each with all its samples", panel=p),
        "ids": _option(str | None, "take the rows whose ids stand in this file, one a line", panel=p),
        "shard": _option(str | None, "take every N-th row from the I-th: I/N, I from 0", panel=p),
        "samples_per_prompt": _option(int, "seeds a row: its own, and N-1 that follow from it", default=1, panel=p),
    }


def image_options() -> dict[str, tuple[Any, Any]]:
    help_ = "folder or s3:// place that images may come from (repeatable; default: the manifest's folder)"
    return {"image_root": _option(list[str] | None, help_, panel="Rows")}


def run_options() -> dict[str, tuple[Any, Any]]:
    p = "Run"
    return {
        "tp": _option(int, "ranks that share a replica's weights (tensor parallelism)", default=1, panel=p),
        "stage2_tp": _option(int | None, "the same for stage 2 (default: as --tp)", panel=p),
        "guidance_parallel": _option(
            int, "sets of --tp ranks that share the guidance passes of stage 1", default=1, panel=p
        ),
        "sequence_parallel": _option(
            int, "sets of --stage2-tp ranks that share the tokens of stage 2 (Ulysses)", default=1, panel=p
        ),
        "stage1_replicas": _option(str, "auto or a number", default="auto", panel=p),
        "stage2_replicas": _option(
            str, "auto or a number; 0: the stage-1 replicas serve both stages in turns", default="auto", panel=p
        ),
        "share_cards": _option(
            str,
            "text and decode share the DiT's cards while these are few: on, off, or auto (on private clusters)",
            default="auto",
            panel=p,
        ),
        "max_replicas": _option(
            int | None, "let a growing cluster have up to N replicas, asked for as they are needed", panel=p
        ),
        "attention": _option(
            str, "auto, fa3 (FlashAttention-3, the package fa3-fwd), cudnn, flash or sdpa", default="auto", panel=p
        ),
        "compile": _option(str, "auto, fused (kernels of ours, on GPUs) or off", default="auto", panel=p),
        "device": _option(str, "auto (GPUs where the cluster has some), cuda or cpu", default="auto", panel=p),
        "ray_address": _option(
            str | None, "cluster to run on (default $RAY_ADDRESS, else a private local one)", panel=p
        ),
        "save_latents": _option(bool, "keep the latents of both stages", "--save-latents", default=False, panel=p),
        "stop_after": _option(str | None, "stage1: make only latents and previews, for ltx-ray promote", panel=p),
        "max_attempts": _option(int, "tries of a row", default=3, panel=p),
        "queue_depth": _option(int, "clips waiting before a stage, for each of its replicas", default=4, panel=p),
        "start_timeout": _option(float, "seconds a replica may take to start", default=1800.0, panel=p),
        "call_timeout": _option(float, "seconds one stage of a clip may take", default=7200.0, panel=p),
        "grace": _option(float, "seconds that decoding has left when the run is told to stop", default=20.0, panel=p),
        "preflight": _option(
            bool,
            "a tiny clip goes through every pool before more than one replica starts",
            "--preflight/--no-preflight",
            default=True,
            panel=p,
        ),
        "max_failed_fraction": _option(float | None, "stop when more than this part of the rows fails", panel=p),
        "max_gpu_hours": _option(float | None, "drain when so many GPU hours are used", panel=p),
    }


PLANNING = (model_options(), row_options(), selection_options(), image_options())
CONFIG = {
    "config": _option(str | None, "YAML file with any of these options by name", panel="Run"),
}


def build_options(manifest: str, output: str | None, values: dict[str, Any], retry_failed: bool = False) -> Options:
    for name, legal in _CHOICES.items():
        if name in values and values[name] not in legal:
            raise ValueError(f"--{name.replace('_', '-')}: {values[name]!r}, legal: {' or '.join(legal)}")
    if values.get("stop_after") not in (None, "stage1"):
        raise ValueError(f"--stop-after: {values['stop_after']!r}, legal: stage1")
    defaults = {}
    for name in row_options():
        if (value := values.get(name)) is not None:
            defaults[name] = _numbers(name, value) if name.endswith("_blocks") else value
    return Options(
        manifest=manifest,
        output=output,
        model=_model_files(values),
        dtype=values["dtype"],
        precision=values["precision"],
        attention=values.get("attention", "auto"),
        compile=values.get("compile", "auto"),
        share_cards=values.get("share_cards", "auto"),
        noise_device=values["noise_device"],
        row_defaults=defaults,
        parallel=ParallelConfig(
            tp=values.get("tp", 1),
            stage2_tp=values.get("stage2_tp"),
            guidance_parallel=at_least("guidance_parallel", values.get("guidance_parallel", 1), 1),
            sequence_parallel=at_least("sequence_parallel", values.get("sequence_parallel", 1), 1),
            stage1=_replicas("stage1_replicas", values, least=1),
            stage2=_replicas("stage2_replicas", values, least=0),
            max_replicas=_optional("max_replicas", values, 1),
        ),
        device=values.get("device", "auto"),
        ray_address=values.get("ray_address"),
        selection=read_selection(values),
        samples_per_prompt=at_least("samples_per_prompt", values.get("samples_per_prompt", 1), 1),
        save_latents=bool(values.get("save_latents")),
        stop_after=values.get("stop_after"),
        image_roots=tuple(values.get("image_root") or ()),
        limits=RunLimits(
            max_attempts=at_least("max_attempts", values.get("max_attempts", 3), 1),
            queue_depth=at_least("queue_depth", values.get("queue_depth", 4), 1),
            start_timeout=at_least("start_timeout", values.get("start_timeout", 1800.0), 1),
            call_timeout=at_least("call_timeout", values.get("call_timeout", 7200.0), 1),
            max_failed_fraction=_fraction("max_failed_fraction", values),
            max_gpu_hours=_optional("max_gpu_hours", values, 0),
            grace=at_least("grace", values.get("grace", 20.0), 0),
        ),
        preflight=values.get("preflight", True),
        retry_failed=retry_failed,
        command=tuple(arg.replace(_JOINT, " ") for arg in sys.argv),
    )


def _model_files(values: dict[str, Any]) -> ModelFiles:
    loras = []
    for entry in values.get("lora") or ():
        path, _, strength = entry.partition(_JOINT)
        if not (_is_number(strength or "1") and math.isfinite(float(strength or 1.0))):
            raise ValueError(f"--lora: {path} {strength}, legal: a finite number as its strength")
        loras.append((path, float(strength or 1.0)))
    if (model := values["model"]) is not None:
        if model not in _PROVIDERS:
            raise ValueError(f"--model: {model!r}, legal: {', '.join(_PROVIDERS)}, or the paths of a model's files")
        own = ("checkpoint_path", "distilled_checkpoint_path", "gemma_root", "spatial_upsampler_path", "distilled_lora")
        given = [name for name in own if values[name]]
        if given:
            raise ValueError(f"--model and --{given[0].replace('_', '-')} exclude each other")
        files = ModelFiles("", "", "", provider=_PROVIDERS[model], loras=lora_files(loras))
        return files
    distilled = values["distilled_checkpoint_path"] is not None
    if distilled and (other := next((n for n in ("checkpoint_path", "distilled_lora") if values[n]), None)):
        raise ValueError(f"--distilled-checkpoint-path and --{other.replace('_', '-')} exclude each other")
    checkpoint = values["distilled_checkpoint_path" if distilled else "checkpoint_path"]
    held = held_by(checkpoint) if checkpoint else {}
    values = {**values, "checkpoint_path": checkpoint, **{k: values[k] or path for k, path in held.items()}}
    needed = ("checkpoint_path", "gemma_root", "spatial_upsampler_path", *(() if distilled else ("distilled_lora",)))
    missing = [f"--{name.replace('_', '-')}" for name in needed if not values[name]]
    if missing:
        raise ValueError(f"no model: give {', '.join(missing)}, or --model toy")
    return ModelFiles(
        checkpoint_path=values["checkpoint_path"],
        gemma_root=values["gemma_root"],
        spatial_upsampler_path=values["spatial_upsampler_path"],
        distilled_lora=values["distilled_lora"],
        loras=lora_files(loras),
        distilled=distilled,
    )


def lora_files(pairs: list[tuple[str, float]]) -> tuple[LoraSpec, ...]:
    """Declared LoRAs from (path, strength); ValueError when two have one name.

    A name is the file's stem, that of PEFT's adapter_model.safetensors its folder.
    """

    def name(path: str) -> str:
        stem = os.path.splitext(os.path.basename(path))[0]
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        return folder if stem == "adapter_model" and folder else stem

    files = tuple(LoraSpec(name(path), path, strength) for path, strength in pairs)
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--lora: two files are named {name!r}; legal: file names that differ")
    return files


def read_selection(values: dict[str, Any]) -> Selection:
    ids = shard = None
    if values.get("ids"):
        try:
            ids = frozenset(line.strip() for line in Path(values["ids"]).read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--ids: {values['ids']}, cannot be read ({error})") from None
    if values.get("shard"):
        index, _, count = values["shard"].partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f"--shard: {values['shard']!r}, legal: I/N with I from 0 to N-1")
        shard = int(index), int(count)
    if values.get("limit") is not None:
        at_least("limit", values["limit"], 1)
    return Selection(values.get("limit"), ids, shard)


def _replicas(name: str, values: dict[str, Any], least: int) -> int | None:
    text = str(values.get(name, "auto"))
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"--{name.replace('_', '-')}: {text!r}, legal: auto or a number from {least}")
    return int(text)


def at_least(name: str, value: Any, least: float) -> Any:
    if not value >= least:
        raise ValueError(f"--{name.replace('_', '-')}: {value}, legal: a number from {least}")
    return value


def _optional(name: str, values: dict[str, Any], least: float) -> Any:
    value = values.get(name)
    return None if value is None else at_least(name, value, least)


def _fraction(name: str, values: dict[str, Any]) -> float | None:
    value = values.get(name)
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"--{name.replace('_', '-')}: {value}, legal: a part of the rows, from 0 to 1")
    return value


def _numbers(name: str, text: str) -> list[int]:
    parts = [part for part in text.replace(",", " ").split()]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--{COLUMNS[name].flag}: {text!r}, legal: block numbers, such as 28,29")
    return [int(part) for part in parts]


def join_loras(argv: list[str]) -> list[str]:
    """`--lora PATH 0.8` as one value, since option parsers want a fixed number."""
    joined: list[str] = []
    for arg in argv:
        after_lora = (len(joined) > 1 and joined[-2] == "--lora") or (joined and joined[-1].startswith("--lora="))
        if after_lora and _JOINT not in joined[-1] and _is_number(arg):
            joined[-1] += _JOINT + arg
        else:
            joined.append(arg)
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def config_defaults(argv: list[str]) -> dict[str, Any]:
    """Options from the file behind --config, by parameter name."""
    path = next((b for a, b in itertools.pairwise(argv) if a == "--config"), None)
    path = path or next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path}, cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path}, holds no mapping; legal: option names and their values")
    groups = (*PLANNING, run_options())
    by_flag = {(option.param_decls or (f"--{name}",))[0].lstrip("-").replace("_", "-"): name
               for group in groups for name, (_, option) in group.items()}  # fmt: skip
    by_flag["output"] = "output"
    defaults = {}
    for key, value in content.items():
        name = by_flag.get(str(key).replace("_", "-"))
        if name is None:
            raise ValueError(f"--config: {path}: unknown option {key!r}; legal: {', '.join(sorted(by_flag))}")
        if name == "lora":
            value = [_lora_entry(path, entry) for entry in (value if isinstance(value, list) else [value])]
        elif name == "image_root":
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        defaults[name] = value
    return defaults


def _lora_entry(path: str, entry: Any) -> str:
    """A LoRA of a config file, a path or {path, strength}, as the option parser takes it."""
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict) or "path" not in entry or set(entry) - {"path", "strength"}:
        raise ValueError(f"--config: {path}: lora: {entry}, legal: a path, or {{path, strength}}")
    return f"{entry['path']}{_JOINT}{entry.get('strength', 1.0)}"
