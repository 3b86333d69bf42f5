"""The `ltx-ray` command: render, plan, status, report, verify, retry, promote, inspect."""

from __future__ import annotations

import inspect as pyinspect
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
import yaml

from ltx_ray.columns import COLUMNS
from ltx_ray.config import ModelFiles, RunLimits, Selection
from ltx_ray.dataset.done import list_done
from ltx_ray.modelfiles import held_by
from ltx_ray.pools.pool import Wanted
from ltx_ray.records import canonical_json
from ltx_ray.run import EXIT_FAILED_ROWS, EXIT_OK, EXIT_USAGE, Options, lora_files, prepare, render
from ltx_ray.storage import Store, join

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

#: Models that `--model` knows: functions that make the files on any node.
_PROVIDERS = {"toy": "ltx_ray.toy:ensure_toy_model"}
#: Joins a LoRA's path and strength on their way through the option parser.
_JOINT = "\x1f"
_PLAN_ROWS = 40
_CHOICES = {
    "device": ("auto", "cuda", "cpu"),
    "dtype": ("bfloat16", "float32"),
    "precision": ("bf16",),
    "noise_device": ("model", "cpu"),
}


def _option(kind: Any, help_: str, *flags: str, default: Any = None, panel: str) -> tuple[Any, Any]:
    return kind, typer.Option(default, *flags, help=help_, rich_help_panel=panel, show_default=default is not None)


def _model_options() -> dict[str, tuple[Any, Any]]:
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
        "precision": _option(str, "precision of the linear layers: bf16", default="bf16", panel=p),
        "noise_device": _option(str, "where noise is drawn: model or cpu", default="model", panel=p),
    }


def _row_options() -> dict[str, tuple[Any, Any]]:
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


def _selection_options() -> dict[str, tuple[Any, Any]]:
    p = "Rows"
    return {
        "limit": _option(int | None, "take the first N rows of the manifest, each with all its samples", panel=p),
        "ids": _option(str | None, "take the rows whose ids stand in this file, one a line", panel=p),
        "shard": _option(str | None, "take every N-th row from the I-th: I/N, I from 0", panel=p),
        "samples_per_prompt": _option(int, "seeds a row: its own, and N-1 that follow from it", default=1, panel=p),
    }


def _image_options() -> dict[str, tuple[Any, Any]]:
    help_ = "folder or s3:// place that images may come from (repeatable; default: the manifest's folder)"
    return {"image_root": _option(list[str] | None, help_, panel="Rows")}


def _run_options() -> dict[str, tuple[Any, Any]]:
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
        "max_replicas": _option(
            int | None, "let a growing cluster have up to N replicas, asked for as they are needed", panel=p
        ),
        "device": _option(str, "auto (GPUs where the cluster has some), cuda or cpu", default="auto", panel=p),
        "ray_address": _option(
            str | None, "cluster to run on (default $RAY_ADDRESS, else a private local one)", panel=p
        ),
        "save_latents": _option(bool, "keep the latents of both stages", "--save-latents", default=False, panel=p),
        "stop_after": _option(str | None, "stage1: make stage-1 latents only", panel=p),
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


def _takes(*groups: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Give a command the options of `groups`; it receives them by name and returns its exit code."""

    def decorate(command: Callable[..., int]) -> Callable[..., None]:
        own = [p for p in pyinspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
        options = [
            pyinspect.Parameter(name, pyinspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for group in groups
            for name, (kind, default) in group.items()
        ]

        def run(**values: Any) -> None:
            try:
                code = command(**values)
            except ValueError as error:
                typer.echo(f"error: {error}", err=True)
                code = EXIT_USAGE
            except (ConnectionError, OSError) as error:
                typer.echo(f"error: {error}", err=True)
                code = 1
            raise typer.Exit(code)

        named = [p.replace(kind=pyinspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = pyinspect.Signature(named + options)
        run.__annotations__ = {p.name: p.annotation for p in named + options}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


_PLANNING = (_model_options(), _row_options(), _selection_options(), _image_options())
_CONFIG = {
    "config": _option(str | None, "YAML file with any of these options by name", panel="Run"),
}


@app.command(name="render")
@_takes(*_PLANNING, _run_options(), _CONFIG)
def render_command(
    manifest: str = typer.Argument(help="Parquet or JSONL manifest, or a folder of them; local, s3:// or gs://"),
    output: str = typer.Option(..., help="where the dataset goes: a folder, s3:// or gs://"),
    **values: Any,
) -> int:
    """Render every row of MANIFEST into a dataset of clips with sound.

    Exit codes: 0 all rows are in the index, 3 some failed (listed), 2 wrong usage or manifest, 4 drained
    on request (run the same command to go on), 1 anything else.
    """
    return render(_options(manifest, output, values))


@app.command(name="retry")
@_takes(_model_options(), _row_options(), _image_options(), _run_options(), _CONFIG)
def retry_command(output: str = typer.Argument(help="a dataset; its failed rows are rendered again"), **values: Any):
    """Render the rows that failed in OUTPUT again, also those that were themselves at fault."""
    manifest = join(output, "failed")
    if not list_done(Store(output)).failed_count:
        typer.echo(f"nothing failed in {output}")
        return EXIT_OK
    return render(_options(manifest, output, values, retry_failed=True))


@app.command(name="promote")
@_takes(_model_options(), _image_options(), _run_options(), _CONFIG)
def promote_command(
    output: str = typer.Argument(help="a dataset with previews, made with --stop-after stage1"),
    ids: str | None = typer.Option(None, help="take the previews whose ids stand in this file, one a line"),
    where: list[str] | None = typer.Option(
        None, help="take those that meet this condition on a column of the index (repeatable): 'flags !~ black'"
    ),
    **values: Any,
) -> int:
    """Take chosen previews of OUTPUT on to finished clips, from their stored stage-1 latents.

    The clips are those that the whole line would have given. Exit codes as those of render.
    """
    from ltx_ray.dataset.chosen import chosen_ids, parse_condition

    if not ids and not where:
        raise ValueError("promote: nothing is chosen; legal: --ids FILE, --where 'COLUMN OP VALUE', or both")
    if values.get("stop_after"):
        raise ValueError("promote: --stop-after has no place here: the clips are finished")
    conditions = [parse_condition(text) for text in where or ()]
    chosen = chosen_ids(Store(output), _selection({"ids": ids}).ids, conditions)
    if not chosen:
        typer.echo(f"no preview in {output} is chosen")
        return EXIT_OK
    options = _options(join(output, "previews"), output, values)
    return render(replace(options, promote=True, selection=Selection(ids=chosen)))


@app.command(name="plan")
@_takes(*_PLANNING, _run_options(), _CONFIG)
def plan_command(
    manifest: str = typer.Argument(help="Parquet or JSONL manifest, or a folder of them"),
    output: str | None = typer.Option(None, help="the dataset to compare with"),
    every: bool = typer.Option(False, "--all", help=f"list every row, not only the first {_PLAN_ROWS}"),
    resolved: bool = typer.Option(False, "--resolved", help="print each listed row as it would be rendered, as JSON"),
    **values: Any,
) -> int:
    """Say what would be rendered, what is done, what is illegal and why, and what it costs.

    Exit code 3 when rows are illegal.
    """
    from ltx_ray.plan import ILLEGAL, cost_line

    prepared = prepare(_options(manifest, output, values))
    plan = prepared.plan
    for warning in prepared.warnings:
        typer.echo(warning, err=True)
    if output:
        plan.done = list_done(Store(output))
    listed = 0
    for planned in plan.open():
        if planned.status == ILLEGAL:
            for message in planned.messages:
                typer.echo(f"illegal  {message}")
        elif every or listed < _PLAN_ROWS:
            listed += 1
            typer.echo(canonical_json(planned.request) if resolved else _plan_line(planned))
        elif listed == _PLAN_ROWS:
            listed += 1
            typer.echo("... (more rows with --all)")
    counts: Counter[str] = plan.counts
    names = {
        "todo": "to render", "done": "done", "copy": "done under another id", "repeated": "repeated",
        "failed": "failed before by their own fault (ltx-ray retry)", "illegal": "illegal",
    }  # fmt: skip
    shown = ", ".join(f"{counts[key]} {text}" for key, text in names.items() if counts[key])
    typer.echo(f"{counts['rows']} rows: {shown or 'none'}")
    typer.echo(cost_line(counts, plan.tflop))
    return EXIT_FAILED_ROWS if counts[ILLEGAL] else EXIT_OK


@app.command(name="status")
@_takes()
def status_command(output: str = typer.Argument(help="a dataset")) -> int:
    """Say how far the newest run into OUTPUT is."""
    from ltx_ray.status import status_lines

    for line in status_lines(output):
        typer.echo(line)
    return EXIT_OK


@app.command(name="report")
@_takes()
def report_command(output: str = typer.Argument(help="a dataset")) -> int:
    """Write OUTPUT/report.html, one page with every clip, its pictures and its timings."""
    from ltx_ray.dataset.report import write_report

    store = Store(output)
    if not any(store.exists(name) for name in ("run.json", "index")):
        raise ValueError(f"{output}: no dataset; legal: the --output of a run")
    path = write_report(output)
    typer.echo(path if store.is_local else join(store.uri, "report.html"))
    return EXIT_OK


@app.command(name="verify")
@_takes(_model_options(), _image_options(), _run_options(), _CONFIG)
def verify_command(
    output: str = typer.Argument(help="a dataset"),
    sample: int = typer.Option(0, help="render so many rows again and compare their latents (wants the model)"),
    mend: bool = typer.Option(False, "--repair", help="move parts of bad rows aside, so that render makes them anew"),
    **values: Any,
) -> int:
    """Check that every row of OUTPUT's index has its clip, unchanged.

    Exit codes: 0 all well, 3 problems found (one a line), 2 wrong usage.
    """
    from ltx_ray.verify import verify

    _at_least("sample", sample, 0)

    def options(manifest: str, place: str) -> Options:
        return _options(manifest, place, values)

    if sample:
        options("", "")  # what is wrong with them is said before the clips are read
    return EXIT_FAILED_ROWS if verify(output, typer.echo, sample, mend, options) else EXIT_OK


@app.command(name="inspect")
@_takes()
def inspect_command(file: str = typer.Argument(help="a safetensors file, or a directory of them")) -> int:
    """Say what a weight file or a model directory holds."""
    from ltx_ray.status import inspect_lines

    for line in inspect_lines(file):
        typer.echo(line)
    return EXIT_OK


def _plan_line(planned: Any) -> str:
    r = planned.request
    prompt = " ".join(r.prompt.split())
    size = f"{r.width}x{r.height}x{r.num_frames}@{r.frame_rate:g}"
    return (
        f"{planned.status:<8} {planned.row.raw.source} ({r.id}) {r.pipeline} {size} steps {r.num_inference_steps} "
        f"seed {r.seed}: {prompt if len(prompt) <= 60 else prompt[:57] + '...'}"
    )


def _options(manifest: str, output: str | None, values: dict[str, Any], retry_failed: bool = False) -> Options:
    for name, legal in _CHOICES.items():
        if name in values and values[name] not in legal:
            raise ValueError(f"--{name.replace('_', '-')}: {values[name]!r}, legal: {' or '.join(legal)}")
    if values.get("stop_after") not in (None, "stage1"):
        raise ValueError(f"--stop-after: {values['stop_after']!r}, legal: stage1")
    defaults = {}
    for name in _row_options():
        if (value := values.get(name)) is not None:
            defaults[name] = _numbers(name, value) if name.endswith("_blocks") else value
    return Options(
        manifest=manifest,
        output=output,
        model=_model_files(values),
        dtype=values["dtype"],
        precision=values["precision"],
        noise_device=values["noise_device"],
        row_defaults=defaults,
        wanted=Wanted(
            tp=values.get("tp", 1),
            stage2_tp=values.get("stage2_tp"),
            guidance_parallel=_at_least("guidance_parallel", values.get("guidance_parallel", 1), 1),
            sequence_parallel=_at_least("sequence_parallel", values.get("sequence_parallel", 1), 1),
            stage1=_replicas("stage1_replicas", values, least=1),
            stage2=_replicas("stage2_replicas", values, least=0),
            max_replicas=values.get("max_replicas") and _at_least("max_replicas", values["max_replicas"], 1),
        ),
        device=values.get("device", "auto"),
        ray_address=values.get("ray_address"),
        selection=_selection(values),
        samples_per_prompt=_at_least("samples_per_prompt", values.get("samples_per_prompt", 1), 1),
        save_latents=bool(values.get("save_latents")),
        stop_after=values.get("stop_after"),
        image_roots=tuple(values.get("image_root") or ()),
        limits=RunLimits(
            max_attempts=_at_least("max_attempts", values.get("max_attempts", 3), 1),
            queue_depth=_at_least("queue_depth", values.get("queue_depth", 4), 1),
            start_timeout=values.get("start_timeout", 1800.0),
            call_timeout=values.get("call_timeout", 7200.0),
            max_failed_fraction=values.get("max_failed_fraction"),
            max_gpu_hours=values.get("max_gpu_hours"),
            grace=values.get("grace", 20.0),
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


def _selection(values: dict[str, Any]) -> Selection:
    ids = shard = None
    if values.get("ids"):
        try:
            ids = frozenset(line.strip() for line in Path(values["ids"]).read_text().splitlines() if line.strip())
        except OSError as error:
            raise ValueError(f"--ids: {values['ids']}, cannot be read ({error.strerror})") from None
    if values.get("shard"):
        index, _, count = values["shard"].partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f"--shard: {values['shard']!r}, legal: I/N with I from 0 to N-1")
        shard = int(index), int(count)
    if values.get("limit") is not None:
        _at_least("limit", values["limit"], 1)
    return Selection(values.get("limit"), ids, shard)


def _replicas(name: str, values: dict[str, Any], least: int) -> int | None:
    text = str(values.get(name, "auto"))
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"--{name.replace('_', '-')}: {text!r}, legal: auto or a number from {least}")
    return int(text)


def _at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise ValueError(f"--{name.replace('_', '-')}: {value}, legal: a number from {least}")
    return value


def _numbers(name: str, text: str) -> list[int]:
    parts = [part for part in text.replace(",", " ").split()]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--{COLUMNS[name].flag}: {text!r}, legal: block numbers, such as 28,29")
    return [int(part) for part in parts]


def _join_loras(argv: list[str]) -> list[str]:
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


def _config_defaults(argv: list[str]) -> dict[str, Any]:
    """Options from the file behind --config, by parameter name."""
    path = next((b for a, b in itertools.pairwise(argv) if a == "--config"), None)
    path = path or next((a.partition("=")[2] for a in argv if a.startswith("--config=")), None)
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path}, cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path}, holds no mapping; legal: option names and their values")
    groups = (*_PLANNING, _run_options())
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


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script and of `jobs/render.py`."""
    argv = _join_loras(sys.argv[1:] if argv is None else argv)
    try:
        defaults = _config_defaults(argv)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(EXIT_USAGE)
    command = typer.main.get_command(app)
    command.main(args=argv, prog_name="ltx-ray", default_map={name: defaults for name in command.commands})


__all__ = ["app", "main"]
