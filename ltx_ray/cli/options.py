"""The options of the `ltx-ray` command, and the run that their values ask for.

Values whose names are those of fields of a dataclass (RunLimits, ParallelConfig ...) go there, and take their defaults
from there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import click
import pyarrow as pa

from ltx_ray.checkpoints.checkpoint import held_by
from ltx_ray.checkpoints.model_paths import look_again
from ltx_ray.cli.config_file import read_config
from ltx_ray.cli.limit_options import LIMIT_OPTIONS
from ltx_ray.cli.parameters import (
    LORA,
    AtLeast,
    BlockNumbers,
    IdsFile,
    Location,
    ModelLocation,
    OneOf,
    Option,
    PathAndStrength,
    ReplicaCount,
    Shard,
    Whole,
)
from ltx_ray.config import LoraSpec, ModelFiles, RequestedNumerics, RunLimits, Selection
from ltx_ray.driver.row_traces import check_traces
from ltx_ray.manifest.columns import COLUMNS, Column, Mistyped, shown
from ltx_ray.manifest.rules import check_defaults
from ltx_ray.manifest.text_values import json_value
from ltx_ray.placement.numerics import NUMERICS_CHOICES
from ltx_ray.placement.sizing import ParallelConfig
from ltx_ray.run import Options
from ltx_ray.storage.locations import split_options

T = TypeVar("T")

#: Models that `--model` knows: the function that makes the files on a node, and whether the checkpoint is distilled.
_BUILT_IN = {
    "miniature": ("ltx_ray.miniature.files:ensure_miniature", False),
    "miniature-distilled": ("ltx_ray.miniature.files:ensure_miniature_distilled", True),
    "toy": ("ltx_ray.toy:ensure_toy_model", False),
}
#: Sections of the help page.
_MODEL, _NUMERICS, _ROWS, _DEFAULTS = "Model", "Numerics", "Rows", "Defaults of columns that a row leaves empty"
_OUTPUT, _CLUSTER, _LAYOUT = "Output", "Cluster", "Replicas and their layout"


def _numerics_option(flag: str, help: str, field: str) -> Option:
    legal, default = NUMERICS_CHOICES[field], getattr(RequestedNumerics, field)
    return Option(flag, section=_NUMERICS, type=OneOf(*legal), metavar="NAME", default=default, help=help)


MODEL_OPTIONS = (
    Option(
        "--model", section=_MODEL, metavar="NAME", help="a tiny one: miniature, miniature-distilled, toy (untrained)"
    ),
    Option(
        "--checkpoint-path",
        section=_MODEL,
        metavar="PATH",
        type=ModelLocation(),
        help="LTX-2.3: a single file, or a diffusers directory; this and others may be s3://, gs:// or hf:// URIs",
    ),
    Option(
        "--distilled-checkpoint-path",
        section=_MODEL,
        metavar="PATH",
        type=ModelLocation(),
        help="the distilled LTX-2.3 instead, for the pipeline distilled",
    ),
    Option(
        "--gemma-root",
        section=_MODEL,
        metavar="DIR",
        type=ModelLocation(),
        help="Gemma 3 (a diffusers directory may hold it)",
    ),
    Option(
        "--spatial-upsampler-path",
        section=_MODEL,
        metavar="PATH",
        type=ModelLocation(),
        help="latent upsampler x2 (a diffusers directory may hold it)",
    ),
    Option("--distilled-lora", section=_MODEL, metavar="PATH", type=ModelLocation(), help="distilled LoRA"),
    Option(
        LORA,
        section=_MODEL,
        metavar="PATH [STRENGTH]",
        type=PathAndStrength(),
        multiple=True,
        help=f"a LoRA for rows and its default strength; repeatable [{LoraSpec.strength:g}]",
    ),
    Option(
        "--weights-cache-gb",
        section=_MODEL,
        metavar="X",
        type=AtLeast(0.0),
        help="GB that a node keeps of files that are given as URIs, in $LTX_RAY_CACHE/weights [all that fit]",
    ),
)

NUMERICS_OPTIONS = (
    _numerics_option("--dtype", "bfloat16 or float32", "dtype"),
    _numerics_option(
        "--precision", "linear layers of the DiT: bf16, or fp8 (faster, about 60 % of the weight memory)", "precision"
    ),
    _numerics_option("--noise-device", "device that draws noise: model or cpu", "noise_device"),
    Option(
        "--allow-other-noise",
        section=_NUMERICS,
        is_flag=True,
        default=Options.allow_other_noise,
        help="go on although the dataset's other clips have the noise of another GPU model, or of a CPU",
    ),
    _numerics_option("--device", "auto (GPUs if the cluster has any), cuda or cpu", "device"),
    _numerics_option("--attention", "auto, fa3 (package fa3-fwd), cudnn, flash or sdpa", "attention"),
    _numerics_option("--compile", "auto, fused (fused GPU kernels) or off", "compile"),
)


class _ColumnValue(click.ParamType):
    """A value of a column that holds no list."""

    def __init__(self, column: Column):
        self.name, self._column = column.name, column

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        column = self._column
        try:
            parsed = column.parse(json_value(column.type, value))
        except Mistyped:
            raise ValueError(f"--{column.flag}: {shown(value)}, legal: {column.legal}") from None
        return check_defaults({column.name: parsed})[column.name]


def _row_option(column: Column) -> Option:
    """`column` names the value; the flag is the reference's."""
    assert column.flag is not None
    kind: click.ParamType = BlockNumbers() if pa.types.is_list(column.type) else _ColumnValue(column)
    metavar = "TEXT" if pa.types.is_string(column.type) else "N,N" if isinstance(kind, BlockNumbers) else "N"
    flag = f"--{column.flag}"
    known_by = "" if column.flag.replace("-", "_") == column.name else f"{column.name}: "
    return Option(column.name, flag, section=_DEFAULTS, type=kind, metavar=metavar, help=f"{known_by}{column.legal}")


ROW_OPTIONS = tuple(_row_option(column) for column in COLUMNS.values() if column.flag is not None)

IMAGE_OPTIONS = (
    Option(
        "--image-root",
        section=_ROWS,
        metavar="DIR",
        type=Location(),
        multiple=True,
        help="folder or s3:// prefix that images may be in; repeatable [the manifest's folder]",
    ),
)

SELECTION_OPTIONS = (
    Option("--limit", section=_ROWS, metavar="N", type=AtLeast(1), help="the first N rows, each with all its samples"),
    Option(
        "--ids", section=_ROWS, metavar="FILE", type=IdsFile(), help="the rows whose ids the file lists, one per line"
    ),
    Option("--shard", section=_ROWS, metavar="I/N", type=Shard(), help="every N-th row from row I, from 0 to N-1"),
    Option(
        "--samples-per-prompt",
        section=_ROWS,
        metavar="N",
        type=AtLeast(1),
        default=Options.samples_per_prompt,
        help="clips of each row, with seeds that follow from the row's",
    ),
)

OUTPUT_OPTIONS = (
    Option("--save-latents", section=_OUTPUT, is_flag=True, default=Options.save_latents, help="store the latents too"),
    Option(
        "--stop-after",
        section=_OUTPUT,
        metavar="stage1",
        type=OneOf("stage1"),
        help="store latents and previews, for ltx-ray promote",
    ),
    Option(
        "--single-writer",
        section=_OUTPUT,
        is_flag=True,
        default=Options.single_writer,
        help="take an object store that replaces a file where none may be; no second run may then write to the output",
    ),
    Option(
        "--wait-for-output",
        section=_OUTPUT,
        metavar="SECONDS",
        type=AtLeast(0.0),
        help="time for another run to leave the output [as long as it takes; with --shard, none]",
    ),
)

CLUSTER_OPTIONS = (
    Option(
        "--ray-address",
        section=_CLUSTER,
        metavar="ADDRESS",
        help="a running cluster [$RAY_ADDRESS, or else a private local cluster]",
    ),
    Option(
        "--wait-for-gpus",
        section=_CLUSTER,
        metavar="SECONDS",
        type=AtLeast(0.0),
        default=Options.wait_for_gpus,
        help="time for a running cluster to get free GPUs",
    ),
    Option(
        "--gpu-model",
        section=_CLUSTER,
        metavar="NAME",
        help="GPUs to use, as Ray names them: H100, A100 … [the model with the most, or all with --noise-device cpu]",
    ),
    Option(
        "--gpu-price",
        section=_CLUSTER,
        metavar="DOLLARS",
        type=AtLeast(0.0),
        help="what one GPU costs an hour, for the cost in plan, status, report and run.json",
    ),
    Option(
        "--trace",
        section=_CLUSTER,
        is_flag=True,
        default=Options.trace,
        help="send OpenTelemetry traces of the rows to OTEL_EXPORTER_OTLP_ENDPOINT; needs ltx-ray[otel]",
    ),
    Option(
        "--share-cards",
        section=_CLUSTER,
        metavar="NAME",
        type=OneOf("auto", "on", "off"),
        default=Options.share_cards,
        help=(
            "text and decode use the DiT's GPUs: off, on, or auto (on where all GPUs are free); on needs GPUs with "
            "enough memory; one gang that fills the cluster shares in any case"
        ),
    ),
    Option(
        "--preflight/--no-preflight",
        section=_CLUSTER,
        default=Options.preflight,
        shown="preflight",
        help="a tiny clip passes every pool before a pool gets a second replica",
    ),
)

LAYOUT_OPTIONS = (
    Option(
        "stage1",
        "--stage1-replicas",
        section=_LAYOUT,
        metavar="N",
        type=ReplicaCount(1),
        default="auto",
        help="replicas of stage 1, or auto",
    ),
    Option(
        "stage2",
        "--stage2-replicas",
        section=_LAYOUT,
        metavar="N",
        type=ReplicaCount(0),
        default="auto",
        help="replicas of stage 2, or auto; 0: those of stage 1 serve both stages in turns",
    ),
    Option(
        "text",
        "--text-replicas",
        section=_LAYOUT,
        metavar="N",
        type=ReplicaCount(1),
        default="auto",
        help="replicas of text, or auto: as many as its calls need",
    ),
    Option(
        "decode",
        "--decode-replicas",
        section=_LAYOUT,
        metavar="N",
        type=ReplicaCount(1),
        default="auto",
        help="replicas of decode, or auto: as many as its calls need",
    ),
    Option(
        "--max-replicas",
        section=_LAYOUT,
        metavar="N",
        type=AtLeast(1),
        help="replicas of both stages that an autoscaling cluster may be asked for",
    ),
    Option(
        "--max-gpus",
        section=_LAYOUT,
        metavar="N",
        type=AtLeast(1),
        help="GPUs that a run may take, those of nodes that join later included [all]",
    ),
    Option(
        "--optimize",
        section=_LAYOUT,
        metavar="GOAL",
        type=OneOf("throughput", "latency"),
        default=ParallelConfig.optimize,
        help="what ranks are for where no option divides anything: the most clips/h, or one clip soonest",
    ),
    Option(
        "--tp",
        section=_LAYOUT,
        metavar="N",
        type=Whole(),
        default=ParallelConfig.tp,
        help="ranks that share a replica's weights (tensor parallelism)",
    ),
    Option("--stage2-tp", section=_LAYOUT, metavar="N", type=Whole(), help="the same for stage 2 [as --tp]"),
    Option(
        "--guidance-parallel",
        section=_LAYOUT,
        metavar="N",
        type=AtLeast(1),
        default=ParallelConfig.guidance_parallel,
        help="groups of --tp ranks that share stage 1's guidance passes",
    ),
    Option(
        "--sequence-parallel",
        section=_LAYOUT,
        metavar="N",
        type=AtLeast(1),
        default=ParallelConfig.sequence_parallel,
        help="groups of --stage2-tp ranks that share stage 2's tokens (Ulysses)",
    ),
    Option(
        "--stage1-sequence-parallel",
        section=_LAYOUT,
        metavar="N",
        type=AtLeast(1),
        default=ParallelConfig.stage1_sequence_parallel,
        help="groups of --tp ranks that share the tokens of each pass of stage 1",
    ),
)

#: Of every command that renders.
RUN_OPTIONS = (*OUTPUT_OPTIONS, *NUMERICS_OPTIONS, *CLUSTER_OPTIONS, *LAYOUT_OPTIONS, *LIMIT_OPTIONS)


def output_option(required: bool, help: str) -> Option:
    return Option("--output", section=_OUTPUT, metavar="URI", type=Location(), required=required, help=help)


def _take_config(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Have the file's values serve as the defaults of the command's other options."""
    if path is None:
        return
    found = read_config(path, _configurable(ctx))
    ctx.default_map = {name: given.value for name, given in found.items()}
    ctx.meta[Option.CONFIG] = found


def _configurable(ctx: click.Context) -> list[click.Option]:
    """The options of every command that takes a config file, so that one file serves them all."""
    group = ctx.find_root().command
    commands = [ctx.command, *(group.commands.values() if isinstance(group, click.Group) else ())]
    options: dict[str, click.Option] = {}
    for command in commands:
        if CONFIG_OPTION in command.params:
            own = [param for param in command.params if isinstance(param, click.Option) and param is not CONFIG_OPTION]
            # The command that runs comes first: its own options convert its values.
            options = {**{option.opts[0]: option for option in own}, **options}
    return list(options.values())


#: Eager, so that its file is read before click looks for the defaults of other options.
CONFIG_OPTION = Option(
    "--config",
    section="Other",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=_take_config,
    help="YAML file with options by name, of this command and of others; every value is the text that stands there",
)


def build_options(manifest: str, output: str | None, values: Mapping[str, Any], retry_failed: bool = False) -> Options:
    """The run that the values of a command's options ask for. Raises ValueError for options that exclude each other."""
    if values["trace"]:
        check_traces()
    given = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    return Options(
        manifest=manifest,
        output=output,
        model=model_files(values),
        numerics=_from_values(RequestedNumerics, values),
        parallel=_from_values(ParallelConfig, values),
        share_cards=values["share_cards"],
        wait_for_gpus=values["wait_for_gpus"],
        gpu_model=values["gpu_model"],
        gpu_price=values["gpu_price"],
        trace=values["trace"],
        allow_other_noise=values["allow_other_noise"],
        ray_address=values["ray_address"],
        row_defaults=given,
        selection=_from_values(Selection, values),
        samples_per_prompt=values.get("samples_per_prompt", Options.samples_per_prompt),
        save_latents=values["save_latents"],
        stop_after=values["stop_after"],
        single_writer=values["single_writer"],
        wait_for_output=values["wait_for_output"],
        allow_illegal=values["allow_illegal"],
        exit_zero_on_failed_rows=values["exit_zero_on_failed_rows"],
        image_roots=values["image_root"],
        limits=_from_values(RunLimits, values),
        retry_failed=retry_failed,
        preflight=values["preflight"],
        command=tuple(sys.argv),
    )


def _from_values(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass whose fields have the values of the same names; the command may lack some of the options."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]  # T is a dataclass.
    return kind(**{name: value for name, value in values.items() if name in names})


def model_files(values: Mapping[str, Any]) -> ModelFiles:
    """The model that the values of MODEL_OPTIONS name."""
    look_again()
    loras = lora_specs(values["lora"])
    bound = values["weights_cache_gb"]
    cache_bytes = None if bound is None else int(bound * 1e9)
    if (model := values["model"]) is not None:
        if model not in _BUILT_IN:
            raise ValueError(f"--model: {model!r}, legal: {', '.join(_BUILT_IN)}, or the paths of a model's files")
        own = ("checkpoint_path", "distilled_checkpoint_path", "gemma_root", "spatial_upsampler_path", "distilled_lora")
        given = [name for name in own if values[name]]
        if given:
            raise ValueError(f"--model and --{given[0].replace('_', '-')} exclude each other")
        provider, distilled = _BUILT_IN[model]
        return ModelFiles("", "", "", loras=loras, distilled=distilled, provider=provider, cache_bytes=cache_bytes)
    distilled = values["distilled_checkpoint_path"] is not None
    if distilled and (other := next((n for n in ("checkpoint_path", "distilled_lora") if values[n]), None)):
        raise ValueError(f"--distilled-checkpoint-path and --{other.replace('_', '-')} exclude each other")
    checkpoint = values["distilled_checkpoint_path" if distilled else "checkpoint_path"]
    # A directory may hold other parts of the model too.
    held = held_by(checkpoint) if checkpoint else {}
    values = {**values, "checkpoint_path": checkpoint, **{name: values[name] or path for name, path in held.items()}}
    needed = ("checkpoint_path", "gemma_root", "spatial_upsampler_path", *(() if distilled else ("distilled_lora",)))
    missing = [f"--{name.replace('_', '-')}" for name in needed if not values[name]]
    if missing:
        raise ValueError(f"no model: give {', '.join(missing)}, or --model miniature")
    return ModelFiles(
        checkpoint_path=values["checkpoint_path"],
        gemma_root=values["gemma_root"],
        spatial_upsampler_path=values["spatial_upsampler_path"],
        distilled_lora=values["distilled_lora"],
        loras=loras,
        distilled=distilled,
        cache_bytes=cache_bytes,
    )


def lora_specs(pairs: Iterable[tuple[str, float]]) -> tuple[LoraSpec, ...]:
    """LoRAs from their paths and strengths; ValueError when two have one name.

    The name is the file's stem, or the folder of a file that PEFT has called adapter_model.safetensors.
    """

    def name(path: str) -> str:
        path = split_options(path)[0]
        stem = os.path.splitext(os.path.basename(path))[0]
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        return folder if stem == "adapter_model" and folder else stem

    specs = tuple(LoraSpec(name(path), path, strength) for path, strength in pairs)
    names = [spec.name for spec in specs]
    for lora_name in names:
        if names.count(lora_name) > 1:
            raise ValueError(f"--lora: two files are named {lora_name!r}; legal: file names that differ")
    return specs
