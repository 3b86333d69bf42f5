"""Judging rows: defaults are resolved, and everything illegal is named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ltx_ray.manifest.columns import COLUMNS, InexactInteger, Mistyped, shown
from ltx_ray.manifest.raw import DAMAGE, FOLDER, RawRow
from ltx_ray.manifest.values import LARGEST_VALUE, digest_of, without_floats
from ltx_ray.presets import DEFAULT_IMAGE_CRF, PIPELINES, Pipeline, served_pipelines
from ltx_ray.records import Guidance, ImageCondition, LoraUse, RenderRequest
from ltx_ray.sampling.schedule_limits import is_sampled, most_frames
from ltx_ray.shapes import ClipShape, size_problems
from ltx_ray.storage.images import locate
from ltx_ray.storage.locations import parent, recorded

#: Columns that the distilled pipeline fixes.
FIXED_WHEN_DISTILLED = frozenset(
    {"num_inference_steps", "negative_prompt", "distilled_lora_strength_stage_1", "distilled_lora_strength_stage_2"}
    | {f"{stream}_{name.name}" for stream in ("video", "audio") for name in dataclasses.fields(Guidance)}
)
#: Columns that take any text.
_FREE_TEXT = frozenset({"prompt", "negative_prompt"})


@dataclass(frozen=True)
class RowProblem:
    """One reason why a row is illegal."""

    column: str
    value: Any
    legal: str


@dataclass(frozen=True)
class LegalRow:
    """A row and the request that it is with all defaults resolved."""

    raw: RawRow
    request: RenderRequest


@dataclass(frozen=True)
class IllegalRow:
    """A row that cannot be rendered, and the reasons (at least one)."""

    #: As a plan counts it, beside the statuses of a PlannedRow.
    status: ClassVar[str] = "illegal"

    raw: RawRow
    problems: tuple[RowProblem, ...]

    @property
    def id(self) -> str | None:
        """The id that the manifest gives it, legal or not."""
        value = self.raw.values.get("id")
        return value if isinstance(value, str) else None

    @property
    def _shown_id(self) -> str:
        """The id; quoted and cut when it is illegal, so that it fits a log line."""
        legal = COLUMNS["id"].check(self.id or "")
        return self.id or "" if legal else shown(self.id)

    def messages(self) -> list[str]:
        """`file:row:column (id): value, what is legal`, one for each problem."""
        named = f" ({self._shown_id})" if self.id else ""
        return [f"{self.raw.source}:{p.column}{named}: {shown(p.value)}, legal: {p.legal}" for p in self.problems]


@dataclass(frozen=True)
class RowRules:
    """What decides, besides the columns' types, which rows are legal: the model's limits and the operator's options."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int | None = None
    #: Pipelines that the checkpoint serves. The first is the default of rows.
    pipelines: tuple[str, ...] = served_pipelines(distilled=False)
    loras: tuple[LoraUse, ...] = ()
    #: Folders that images may come from; when empty, the folder of the row's file, from which relative paths count.
    image_roots: tuple[str, ...] = ()


def judge(raw: RawRow, rules: RowRules) -> LegalRow | IllegalRow:
    """Resolve the defaults of `raw`, or find everything that is illegal in it."""
    if raw.unreadable is not None:
        return IllegalRow(raw, (_unreadable(raw),))
    problems: list[RowProblem] = []
    given: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        value = raw.values.get(name)
        if value is None:
            continue
        try:
            parsed = column.parse(value)
        except InexactInteger:
            problems.append(RowProblem(name, value, "an integer, or a float below 2^53 in size: larger are inexact"))
            continue
        except Mistyped:
            problems.append(RowProblem(name, value, column.legal))
            continue
        if column.check(parsed):
            given[name] = parsed
        elif name in _FREE_TEXT and (_has_surrogates(parsed) or "\0" in parsed):
            problems.append(RowProblem(name, value, f"{column.legal}, in UTF-8 without NUL"))
        else:
            problems.append(RowProblem(name, value, column.legal))
    if raw.duplicate:
        problems.append(duplicate_id(raw.values.get("id")))
    if raw.values.get("prompt") is None:
        problems.append(RowProblem("prompt", None, COLUMNS["prompt"].legal))

    pipeline_name = given.get("pipeline", rules.pipelines[0])
    if pipeline_name not in rules.pipelines:
        served = " or ".join(rules.pipelines)
        why = "which the loaded checkpoint does not serve" if pipeline_name in PIPELINES else "which is unknown"
        problems.append(RowProblem("pipeline", pipeline_name, f"{served} (not {pipeline_name!r}, {why})"))
        pipeline_name = rules.pipelines[0]
    pipeline = PIPELINES[pipeline_name]
    defaults = {**pipeline.defaults, "loras": rules.loras}
    for name, value in {**rules.defaults, **given}.items():
        # the distilled pipeline has no guidance and a fixed schedule
        if pipeline.distilled and name in FIXED_WHEN_DISTILLED and value != defaults[name]:
            problems.append(RowProblem(name, value, f"{defaults[name]!r} or nothing: the distilled pipeline fixes it"))
    values = {**defaults, **rules.defaults, "id": None, **given, "pipeline": pipeline_name}

    asked = given.keys() | rules.defaults.keys()
    if raw.from_failed and pipeline.defaults.keys() - {"seed"} <= raw.values.keys():
        # Its defaults stand in the row, which did not ask for them. An illegal row stands there as it was written.
        asked = {name for name in asked if values[name] != defaults.get(name)}
    problems += _cross_checks(values, rules, asked, {p.column for p in problems})
    images, misplaced = _located(values["images"], parent(raw.file) or ".", rules.image_roots)
    problems += misplaced
    if problems:
        return IllegalRow(raw, tuple(problems))
    values["loras"] = _in_declared_order(values["loras"], rules.loras)
    values["images"] = images
    values["extra"] = extra_json(raw)
    return LegalRow(raw, RenderRequest(**values))


def resolved_values(request: RenderRequest) -> dict[str, Any]:
    """The manifest row of `request` with every default filled in: it asks for the same clip in a run with others."""
    values = {name: value for name, value in request.row().items() if name != "extra"}
    return {**json.loads(request.extra or "{}"), **values}


def _unreadable(raw: RawRow) -> RowProblem:
    if raw.fault == FOLDER:
        return RowProblem("row", raw.unreadable, "one value, in the row or in its folder's name")
    if raw.fault == DAMAGE:
        return RowProblem("row", raw.unreadable, "an undamaged file")
    return RowProblem("row", raw.unreadable, "one JSON object per line")


def duplicate_id(row_id: Any) -> RowProblem:
    return RowProblem("id", row_id, "an id of its own: an earlier row has it, with other content")


def check_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Parse and check row defaults from the command line like values of a row. Raises ValueError naming the option."""
    parsed = {}
    for name, value in defaults.items():
        column = COLUMNS[name]
        try:
            parsed[name] = column.parse(value)
        except Mistyped:
            raise ValueError(f"--{column.flag}: {shown(value)}, legal: {column.legal}") from None
        if not column.check(parsed[name]):
            raise ValueError(f"--{column.flag}: {shown(value)}, legal: {column.legal}")
    return parsed


def _cross_checks(values: Mapping[str, Any], rules: RowRules, asked: set[str], bad: set[str]) -> list[RowProblem]:
    problems = []
    if not bad & {"height", "width", "num_frames", "frame_rate"}:
        shape = ClipShape(values["num_frames"], values["height"], values["width"], values["frame_rate"])
        wrong_sizes = [RowProblem(*problem) for problem in size_problems(shape)]
        problems += wrong_sizes
        if not wrong_sizes and "num_inference_steps" not in bad:
            problems += _schedule_problems(PIPELINES[values["pipeline"]], values["num_inference_steps"], shape)
    if rules.num_layers is not None:
        for name in ("video_stg_blocks", "audio_stg_blocks"):
            # a pipeline's default may name a block that a smaller model does not have
            if name in asked and any(block >= rules.num_layers for block in values[name]):
                problems.append(RowProblem(name, list(values[name]), f"block numbers from 0 to {rules.num_layers - 1}"))
    declared = {use.name for use in rules.loras}
    for use in values["loras"]:
        if use.name not in declared:
            known = ", ".join(sorted(declared)) or "none declared; give --lora PATH"
            problems.append(RowProblem("loras", use.name, f"a name declared with --lora ({known})"))
    for image in values["images"]:
        if "num_frames" not in bad and image.frame_idx >= values["num_frames"]:
            legal = f"a frame_idx from 0 to {values['num_frames'] - 1}"
            problems.append(RowProblem("images", f"frame_idx {image.frame_idx} of {image.path}", legal))
    return problems


def _schedule_problems(pipeline: Pipeline, steps: int, shape: ClipShape) -> list[RowProblem]:
    """Why the schedule of stage 1, computed from the clip's tokens, cannot be sampled."""
    computed = pipeline.sigmas is None and pipeline.schedule_tokens is None
    if not computed or is_sampled(steps, shape.half().video_tokens):
        return []
    frames = most_frames(steps, shape)
    size = f"{shape.height}x{shape.width}"
    if frames is None:
        return [RowProblem("height", shape.height, f"a size less than {size}: a frame has too many tokens")]
    legal = f"at most {frames} at {size} with {steps} steps: the noise levels of more tokens coincide"
    return [RowProblem("num_frames", shape.num_frames, legal)]


def _located(
    images: tuple[ImageCondition, ...], folder: str, roots: tuple[str, ...]
) -> tuple[tuple[ImageCondition, ...], list[RowProblem]]:
    """Images with paths that workers can open, and the default crf of LTX-2.3 where none is given."""
    found, problems, roots = [], [], roots or (folder,)
    for image in images:
        path = locate(image.path, folder, roots)
        if path is None:
            problems.append(
                RowProblem("images", image.path, f"a path inside an --image-root ({', '.join(map(recorded, roots))})")
            )
        else:
            crf = DEFAULT_IMAGE_CRF if image.crf is None else image.crf
            found.append(dataclasses.replace(image, path=path, crf=crf))
    return tuple(found), problems


def extra_json(raw: RawRow) -> str | None:
    """Unknown columns as standard JSON, without NaN, lone surrogates and long values. None when there are none."""
    extra = {k: v for k, v in raw.values.items() if k not in COLUMNS}
    if not extra:
        return None
    text = _standard_json(extra)
    if len(text) > LARGEST_VALUE:
        text = _standard_json({k: _short(v) for k, v in extra.items()})
    return text


def _standard_json(value: Any) -> str:
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        finite = without_floats(value, lambda number: not math.isfinite(number))
        text = json.dumps(finite, sort_keys=True, ensure_ascii=False, default=str)
    return json.dumps(json.loads(text), sort_keys=True) if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    """Whether `text` has lone surrogates, as bytes that are not UTF-8 leave them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _short(value: Any) -> Any:
    """`value`, or the size and digest of its JSON when that is long."""
    text = _standard_json(value)
    return value if len(text) <= LARGEST_VALUE else digest_of(text.encode())


def _in_declared_order(uses: tuple[LoraUse, ...], declared: tuple[LoraUse, ...]) -> tuple[LoraUse, ...]:
    order = {use.name: position for position, use in enumerate(declared)}
    return tuple(sorted(uses, key=lambda use: order[use.name]))
