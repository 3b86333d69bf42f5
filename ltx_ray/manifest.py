"""Parquet and JSONL manifests as a stream of rows, each a RenderRequest or the reasons why not.

What is wrong with a file is a ValueError before the first row; what is wrong with a row stays with it.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ltx_ray.columns import COLUMNS, Mistyped, arrow_type_fits
from ltx_ray.recipe import DEFAULT_IMAGE_CRF, PIPELINES, served_pipelines
from ltx_ray.records import Guidance, ImageCondition, LoraUse, RenderRequest
from ltx_ray.shapes import ClipShape, size_problems
from ltx_ray.storage.images import locate
from ltx_ray.storage.store import Store, join, parent

#: Rows of a JSONL file that decide whether a column as a whole has the wrong type.
_PEEK_ROWS = 1000
#: A table written to OUT/failed carries its rows as they were in this column, so that it can be rendered again.
FAILED_ROW_COLUMN = "manifest_row"
#: Its only key when the row could not be read at all.
UNREADABLE = "_unreadable"
#: A key beside its values when its id belonged to another row.
DUPLICATE = "_duplicate_id"
#: Columns that say nothing to the distilled pipeline.
FIXED_WHEN_DISTILLED = frozenset(
    {"num_inference_steps", "negative_prompt", "distilled_lora_strength_stage_1", "distilled_lora_strength_stage_2"}
    | {f"{stream}_{name.name}" for stream in ("video", "audio") for name in dataclasses.fields(Guidance)}
)
#: Parquet rows that are made Python together, and bytes of a column that are read ahead.
_PARQUET_ROWS, _PARQUET_BUFFER = 4096, 1 << 20
#: Width of the longest value an error message repeats.
_SHOWN = 120


class RawRow(NamedTuple):
    """A row as read: where it stands (`file`, `number` from 1) and its values, or why it has none."""

    file: str
    number: int
    values: Mapping[str, Any]
    unreadable: str | None = None
    #: Known to have the id of another row; only its own manifest can mend that, not a retry.
    duplicate: bool = False
    #: Read from a dataset's failed/: a row as it was resolved, one sample of its prompt.
    from_failed: bool = False

    @property
    def source(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Problem:
    """One reason why a row is illegal."""

    column: str
    value: Any
    legal: str


@dataclass(frozen=True)
class Row:
    """A row read and judged: `request` is None exactly when there are `problems`."""

    raw: RawRow
    request: RenderRequest | None
    problems: tuple[Problem, ...] = ()

    @property
    def id(self) -> str | None:
        value = self.raw.values.get("id")
        return value if isinstance(value, str) else None

    @property
    def _shown_id(self) -> str:
        """The id when it is one, otherwise a spelling of it that fits any log line."""
        legal = COLUMNS["id"].check(self.id or "")
        return self.id or "" if legal else _shown(self.id)

    def messages(self) -> list[str]:
        """`file:row:column (id): value, what is legal`, one for each problem."""
        named = f" ({self._shown_id})" if self.id else ""
        return [f"{self.raw.source}:{p.column}{named}: {_shown(p.value)}, legal: {p.legal}" for p in self.problems]


@dataclass(frozen=True)
class RowRules:
    """What is legal in rows beyond their types: the model's limits and the operator's choices.

    Relative image paths count from the folder of the row's file; `image_roots` are where images may be.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    num_layers: int | None = None
    #: Pipelines that the checkpoint serves; the first is what rows get that name none.
    pipelines: tuple[str, ...] = served_pipelines(distilled=False)
    loras: tuple[LoraUse, ...] = ()
    #: Folders that images may come from; empty: the folder of the row's own file.
    image_roots: tuple[str, ...] = ()


# --- reading -------------------------------------------------------------------------------------


def read_manifest(uri: str) -> Iterator[RawRow]:
    """Stream the rows of a manifest: a .jsonl/.ndjson/.json file, a .parquet file, or a folder of either.

    Raises ValueError at once (not at the first `next`) for a manifest that is missing or cannot be
    read, that has no `prompt` column, or that has a column of the wrong type.
    """
    store = Store(uri)
    kind = store.fs.get_file_info(store.root).type
    if kind == pafs.FileType.NotFound:
        raise ValueError(f"{uri}: no such manifest; legal: a .jsonl or .parquet file, or a folder of them")
    if kind == pafs.FileType.Directory:
        selector = pafs.FileSelector(store.root, recursive=True)
        files = sorted(
            info.path
            for info in store.fs.get_file_info(selector)
            if info.type == pafs.FileType.File
            and info.path.endswith((".parquet", ".jsonl", ".ndjson"))
            and not any(part.startswith((".", "_")) for part in info.path[len(store.root) :].split("/"))
        )
        if not files:
            raise ValueError(f"{uri}: holds no .parquet or .jsonl file")
        names = [join(store.uri, path[len(store.root) + 1 :]) for path in files]
    else:
        files, names = [store.root], [uri]
    readers = []
    for path, name in zip(files, names, strict=True):
        if path.endswith((".jsonl", ".ndjson", ".json")):
            readers.append(_jsonl_rows(store.fs, path, name))
        elif path.endswith((".parquet", ".pq")):
            readers.append(_parquet_rows(store.fs, path, name))
        else:
            raise ValueError(f"{name}: not a manifest; legal: a name that ends in .jsonl, .ndjson, .json or .parquet")
    return itertools.chain.from_iterable(readers)


def manifest_folder(uri: str) -> str:
    """The folder against which a manifest's relative image paths are resolved."""
    store = Store(uri)
    place = store.root if store.is_local else store.uri
    if store.fs.get_file_info(store.root).type == pafs.FileType.Directory:
        return place
    return parent(place)


def _parquet_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    try:
        # closed again: a folder may have more files than a process may open
        with fs.open_input_file(path) as file:
            schema = pq.ParquetFile(file).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet ({error})") from None
    if {FAILED_ROW_COLUMN, "source"} <= set(schema.names):
        return _failed_rows(fs, path, name)
    if "prompt" not in schema.names:
        raise ValueError(f"{name}: has no column 'prompt' (it has {', '.join(schema.names) or 'none'})")
    for column_name in schema.names:
        column = COLUMNS.get(column_name)
        if column is not None and not arrow_type_fits(column, schema.field(column_name).type):
            found = schema.field(column_name).type
            raise ValueError(f"{name}: column '{column_name}' has type {found}; legal: {column.type} ({column.legal})")

    return map(RawRow, itertools.repeat(name), itertools.count(1), _parquet_values(fs, path, name))


def _parquet_values(
    fs: pafs.FileSystem, path: str, name: str, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    try:
        with fs.open_input_file(path) as file:
            # otherwise whole columns of a row group are read at once, and kept until the end of the file
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=_PARQUET_BUFFER)
            for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                names = batch.schema.names
                for cells in zip(*map(_cells, batch.columns), strict=True):
                    yield dict(zip(names, cells, strict=True))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read as Parquet ({error})") from None


def _cells(column: pa.Array) -> list[Any]:
    values = column.to_pylist()
    if pa.types.is_string(column.type) or pa.types.is_integer(column.type):
        return values
    # pandas writes gaps in a column of numbers as NaN
    return [None if _is_nan(value) else value for value in values]


def _failed_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    for row in _parquet_values(fs, path, name, [FAILED_ROW_COLUMN, "source"]):
        # the row keeps its first place, so that it is known again
        origin, _, number = (row["source"] or f"{name}:0").rpartition(":")
        yield _parse_line(origin, int(number), row[FAILED_ROW_COLUMN])._replace(from_failed=True)


def _jsonl_rows(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    try:
        peeked = list(itertools.islice(_parsed_lines(fs, path, name), _PEEK_ROWS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name}: cannot be read ({error})") from None
    readable = [row for row in peeked if row.unreadable is None]
    if peeked and not readable:
        raise ValueError(f"{name}: cannot be read as JSON lines ({peeked[0].source}: {peeked[0].unreadable})")
    if readable and not any("prompt" in row.values for row in readable):
        raise ValueError(f"{name}: has no column 'prompt' (it has {', '.join(sorted(readable[0].values)) or 'none'})")
    given: Counter[str] = Counter()
    wrong: dict[str, list[Any]] = {}
    for row in readable:
        for key, value in row.values.items():
            if key in COLUMNS and value is not None:
                given[key] += 1
                try:
                    COLUMNS[key].parse(value)
                except Mistyped:
                    wrong.setdefault(key, []).append(value)
    for key, values in wrong.items():
        if len(values) == given[key]:
            raise ValueError(
                f"{name}: column '{key}' has type {_json_type(values[0])} (such as {_shown(values[0])}); "
                f"legal: {COLUMNS[key].type} ({COLUMNS[key].legal})"
            )
    return _parsed_lines(fs, path, name)


def _parsed_lines(fs: pafs.FileSystem, path: str, name: str) -> Iterator[RawRow]:
    with io.TextIOWrapper(fs.open_input_stream(path), encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _parse_line(name, number, line)


def _parse_line(name: str, number: int, line: str) -> RawRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RawRow(name, number, {}, unreadable=f"not JSON ({error})")
    if not isinstance(values, dict):
        return RawRow(name, number, {}, unreadable=f"a JSON {_json_type(values)}, not an object")
    if set(values) == {UNREADABLE}:
        return RawRow(name, number, {}, unreadable=str(values[UNREADABLE]))
    duplicate = values.pop(DUPLICATE, False) is True
    return RawRow(name, number, values, duplicate=duplicate)


# --- judging -------------------------------------------------------------------------------------


def judge(raw: RawRow, rules: RowRules) -> Row:
    """Resolve the defaults of `raw` and find everything that is illegal in it."""
    if raw.unreadable is not None:
        return Row(raw, None, (Problem("row", raw.unreadable, "one JSON object a line"),))
    problems: list[Problem] = []
    given: dict[str, Any] = {}
    for name, column in COLUMNS.items():
        value = raw.values.get(name)
        if value is None:
            continue
        try:
            parsed = column.parse(value)
        except Mistyped:
            problems.append(Problem(name, value, column.legal))
            continue
        if column.check(parsed):
            given[name] = parsed
        else:
            problems.append(Problem(name, value, column.legal))
    if raw.duplicate:
        problems.append(duplicate_id(raw.values.get("id")))
    if raw.values.get("prompt") is None:
        problems.append(Problem("prompt", None, COLUMNS["prompt"].legal))

    pipeline_name = given.get("pipeline", rules.pipelines[0])
    if pipeline_name not in rules.pipelines:
        served = " or ".join(rules.pipelines)
        why = "which the loaded checkpoint does not serve" if pipeline_name in PIPELINES else "which is unknown"
        problems.append(Problem("pipeline", pipeline_name, f"{served} (not {pipeline_name!r}, {why})"))
        pipeline_name = rules.pipelines[0]
    pipeline = PIPELINES[pipeline_name]
    defaults = {**pipeline.defaults, "loras": rules.loras}
    for name, value in {**rules.defaults, **given}.items():
        # a pipeline without guidance and with a schedule of its own has nothing to set there
        if pipeline.distilled and name in FIXED_WHEN_DISTILLED and value != defaults[name]:
            problems.append(Problem(name, value, f"{defaults[name]!r} or nothing: the distilled pipeline fixes it"))
    values = {**defaults, **rules.defaults, "id": None, **given, "pipeline": pipeline_name}

    asked = given.keys() | rules.defaults.keys()
    problems += _cross_checks(values, rules, asked, {p.column for p in problems})
    images, misplaced = _located(values["images"], parent(raw.file), rules.image_roots)
    problems += misplaced
    if problems:
        return Row(raw, None, tuple(problems))
    values["loras"] = _in_declared_order(values["loras"], rules.loras)
    values["images"] = images
    values["extra"] = extra_json(raw)
    return Row(raw, RenderRequest(**values))


def duplicate_id(row_id: Any) -> Problem:
    return Problem("id", row_id, "an id of its own: an earlier row has it, with other content")


def check_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Row defaults from the command line, parsed and checked as a row's values would be."""
    parsed = {}
    for name, value in defaults.items():
        column = COLUMNS[name]
        try:
            parsed[name] = column.parse(value)
        except Mistyped:
            raise ValueError(f"--{column.flag}: {_shown(value)}, legal: {column.legal}") from None
        if not column.check(parsed[name]):
            raise ValueError(f"--{column.flag}: {_shown(value)}, legal: {column.legal}")
    return parsed


def _cross_checks(values: Mapping[str, Any], rules: RowRules, asked: set[str], bad: set[str]) -> list[Problem]:
    problems = []
    if not bad & {"height", "width", "num_frames", "frame_rate"}:
        shape = ClipShape(values["num_frames"], values["height"], values["width"], values["frame_rate"])
        problems += [Problem(*problem) for problem in size_problems(shape)]
    if rules.num_layers is not None:
        for name in ("video_stg_blocks", "audio_stg_blocks"):
            # a pipeline's own default may name a block that a smaller model does not have
            if name in asked and any(block >= rules.num_layers for block in values[name]):
                problems.append(Problem(name, list(values[name]), f"block numbers from 0 to {rules.num_layers - 1}"))
    declared = {use.name for use in rules.loras}
    for use in values["loras"]:
        if use.name not in declared:
            known = ", ".join(sorted(declared)) or "none declared; give --lora PATH"
            problems.append(Problem("loras", use.name, f"a name declared with --lora ({known})"))
    for image in values["images"]:
        if "num_frames" not in bad and image.frame_idx >= values["num_frames"]:
            legal = f"a frame_idx from 0 to {values['num_frames'] - 1}"
            problems.append(Problem("images", f"frame_idx {image.frame_idx} of {image.path}", legal))
    return problems


def _located(
    images: tuple[ImageCondition, ...], folder: str, roots: tuple[str, ...]
) -> tuple[tuple[ImageCondition, ...], list[Problem]]:
    """Images with paths that workers can open, and the crf of the model's generation where none is given."""
    found, problems, roots = [], [], roots or (folder,)
    for image in images:
        path = locate(image.path, folder, roots)
        if path is None:
            problems.append(Problem("images", image.path, f"a path inside an --image-root ({', '.join(roots)})"))
        else:
            crf = DEFAULT_IMAGE_CRF if image.crf is None else image.crf
            found.append(dataclasses.replace(image, path=path, crf=crf))
    return tuple(found), problems


def extra_json(raw: RawRow) -> str | None:
    """Unknown columns as JSON that any reader takes: no NaN, no half characters. None without any."""
    extra = {k: v for k, v in raw.values.items() if k not in COLUMNS}
    if not extra:
        return None
    try:
        text = json.dumps(extra, sort_keys=True, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(extra), sort_keys=True, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), sort_keys=True)
    return text


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_declared_order(uses: tuple[LoraUse, ...], declared: tuple[LoraUse, ...]) -> tuple[LoraUse, ...]:
    order = {use.name: position for position, use in enumerate(declared)}
    return tuple(sorted(uses, key=lambda use: order[use.name]))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
