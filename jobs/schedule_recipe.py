"""The recipe of a schedule: its fields, and the manifest rows it expands to on a date.

Everything here gives the same result for the same recipe and date, on any machine and Python version.
schedule.py, the program, describes the fields of a recipe.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ltx_ray.storage.locations import resolve

Row = dict[str, Any]

#: Optional fields of a manifest row (docs/manifest.md); the recipe itself gives `id` and `prompt`.
ROW_FIELDS = frozenset(
    "negative_prompt seed height width num_frames frame_rate num_inference_steps pipeline loras images "
    "distilled_lora_strength_stage_1 distilled_lora_strength_stage_2".split()
    + [
        f"{kind}_{name}"
        for kind in ("video", "audio")
        for name in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale", "stg_blocks", "skip_step")
    ]
)
RECIPE_FIELDS = "name output prompts variables manifest count seed defaults render_options".split()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: A recipe without `count` that expands to more rows than this is more likely a mistake than intended.
MOST_WITHOUT_COUNT = 100_000


# ---- the recipe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with {variables}: its text, and the names of the variables in order of first use."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. schedule.py's docstring describes the fields."""

    name: str
    output: str
    templates: tuple[PromptTemplate, ...] = ()
    variables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    manifest: str | None = None
    count: int | None = None
    seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    render_options: tuple[str, ...] = ()


def require(what: str, value: Any, ok: bool, legal: str) -> None:
    """Raise ValueError with the field, its value and what is legal, unless `ok`."""
    if not ok:
        raise ValueError(f"{what}: {value!r}, must be {legal}")


def parse_recipe(text: str, folder: str = ".") -> Recipe:
    """Parse YAML text; a relative `manifest` is resolved against `folder`.

    Raises ValueError with the field, its value and what is legal.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    require("recipe", data, isinstance(data, dict), "a mapping of fields")
    for key in data:
        require("unknown field", key, key in RECIPE_FIELDS, "one of " + ", ".join(RECIPE_FIELDS))
    name, output = _parse_name_and_output(data)
    variables = _parse_variables(data.get("variables") or {})
    manifest = _parse_manifest(data.get("manifest"), folder)
    templates = _parse_prompts(data.get("prompts") or [], variables, optional=manifest is not None)
    count, seed = data.get("count"), data.get("seed")
    require("count", count, count is None or (_is_int(count) and count > 0), "a whole number of at least 1")
    require("seed", seed, seed is None or (_is_int(seed) and 0 <= seed < 2**63), "a whole number, 0 to 2^63-1")
    return Recipe(
        name,
        output,
        templates,
        variables,
        manifest,
        count,
        seed or 0,
        _parse_defaults(data.get("defaults") or {}),
        _parse_render_options(data.get("render_options") or []),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_name_and_output(data: Mapping[str, Any]) -> tuple[str, str]:
    for key in ("name", "output"):
        require(key, data.get(key), data.get(key) is not None, "given")
    name, output = data["name"], data["output"]
    require(
        "name",
        name,
        isinstance(name, str) and bool(NAME.fullmatch(name)),
        "a string of 1 to 64 letters, digits, '.', '_' and '-' that begins with a letter or digit",
    )
    require("output", output, isinstance(output, str) and bool(output.strip()), "a path or URI")
    _placeholders("output", output, ("date", "name"))
    return name, output


def _parse_variables(variables: Any) -> dict[str, tuple[str, ...]]:
    """Each variable's values, as the text that goes into a prompt."""
    require("variables", variables, isinstance(variables, dict), "a mapping of name to list")
    for key, values in variables.items():
        require("variables", key, isinstance(key, str) and key.isidentifier(), "a name like animal or time_of_day")
        require(
            f"variables.{key}",
            values,
            isinstance(values, list) and bool(values) and all(isinstance(v, str) or _is_int(v) for v in values),
            "a list of at least one string or whole number",
        )
    return {key: tuple(str(value) for value in values) for key, values in variables.items()}


def _parse_prompts(prompts: Any, variables: Mapping[str, Any], optional: bool) -> tuple[PromptTemplate, ...]:
    require(
        "prompts",
        prompts,
        isinstance(prompts, list) and all(isinstance(p, str) and p.strip() for p in prompts),
        "a list of strings that are not blank",
    )
    templates = tuple(
        PromptTemplate(prompt, _placeholders(f"prompts[{i}]", prompt, tuple(variables)))
        for i, prompt in enumerate(prompts)
    )
    used = {name for template in templates for name in template.names}
    for key in variables:
        require("variables", key, key in used, "used as {" + key + "} by one of the prompts")
    require("prompts", prompts, bool(prompts) or optional, "given, or `manifest`, or both")
    return templates


def _placeholders(what: str, text: str, legal: Sequence[str]) -> tuple[str, ...]:
    """The names of the {placeholders} in `text`, each once. Raises ValueError for a name that is not in `legal`."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{what}: {text!r}, {error} (write '{{{{' for a literal brace)") from None
    names: list[str] = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in legal or spec or conversion:
            shown = "{" + name + ("!" + conversion if conversion else "") + (":" + spec if spec else "") + "}"
            known = ", ".join("{" + n + "}" for n in legal) or "none are defined"
            raise ValueError(f"{what}: {shown} in {text!r} is not a known variable; known: {known}")
        if name not in names:
            names.append(name)
    return tuple(names)


def _parse_manifest(manifest: Any, folder: str) -> str | None:
    legal = manifest is None or (isinstance(manifest, str) and bool(manifest))
    require("manifest", manifest, legal, "a path or URI")
    return None if manifest is None else resolve(manifest, folder)


def _parse_defaults(defaults: Any) -> dict[str, Any]:
    require("defaults", defaults, isinstance(defaults, dict), "a mapping of row fields")
    for key, value in defaults.items():
        require("defaults", key, key in ROW_FIELDS, "one of " + ", ".join(sorted(ROW_FIELDS)))
        _dumps(f"defaults.{key}", value)
    return defaults


def _parse_render_options(options: Any) -> tuple[str, ...]:
    require(
        "render_options",
        options,
        isinstance(options, list) and all(isinstance(o, str | float) or _is_int(o) for o in options),
        "a list of strings and numbers",
    )
    words = tuple(str(option) for option in options)
    for word in words:
        legal = word.split("=")[0] != "--output"
        require("render_options", word, legal, "without --output: the recipe has `output`")
    return words


# ---- rows --------------------------------------------------------------------------------------------


def _draw(limit: int, *key: Any) -> int:
    """A whole number in [0, limit) derived from `key`.

    It comes from sha256 because Python's `random` may change between versions.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest, "big") % limit


def sample(total: int, count: int, *key: Any) -> list[int]:
    """`count` distinct numbers of range(total), ascending, chosen by `key`.

    A Fisher-Yates shuffle that stores only the entries it moves, since `total` may be a huge product.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        j = i + _draw(total - i, *key, i)
        moved[i], moved[j] = moved.get(j, j), moved.get(i, i)
    return sorted(moved[i] for i in range(count))


def _count_combinations(recipe: Recipe, template: PromptTemplate) -> int:
    return math.prod(len(recipe.variables[name]) for name in template.names)


def _expand_one(recipe: Recipe, index: int) -> Row:
    """Row number `index` of all templates, one after the other; the last variable of a template varies fastest."""
    for template in recipe.templates:
        size = _count_combinations(recipe, template)
        if index < size:
            return _fill(recipe, template, index)
        index -= size
    raise AssertionError("index is past the last row")


def _fill(recipe: Recipe, template: PromptTemplate, index: int) -> Row:
    """Row number `index` of one template."""
    chosen: dict[str, str] = {}
    for name in reversed(template.names):
        values = recipe.variables[name]
        index, k = divmod(index, len(values))
        chosen[name] = values[k]
    chosen = {name: chosen[name] for name in template.names}
    row: Row = {"prompt": template.text.format(**chosen)}
    return {**row, "variables": chosen} if chosen else row


def expand(recipe: Recipe, date: str, source: SourceManifest | None = None) -> Iterator[Row]:
    """The rows of one date, in manifest order, as dicts of JSON values without nulls.

    `source` is the recipe's manifest. Raises ValueError when there are fewer than `count` rows, or more than
    MOST_WITHOUT_COUNT and no `count`.
    """
    from_templates = sum(_count_combinations(recipe, template) for template in recipe.templates)
    total = from_templates + (len(source) if source else 0)
    picked: Sequence[int]
    if recipe.count is None:
        require("count", None, total <= MOST_WITHOUT_COUNT, f"given, as the recipe expands to {total} rows")
        picked = range(total)
    else:
        require("count", recipe.count, recipe.count <= total, f"at most {total}, the rows the recipe expands to")
        picked = sample(total, recipe.count, "sample", recipe.seed, recipe.name, date)
    require("recipe", recipe.name, len(picked) > 0, "one that gives at least one row")
    from_source = source.take([i - from_templates for i in picked if i >= from_templates]) if source else iter(())
    rows = itertools.chain((_expand_one(recipe, i) for i in picked if i < from_templates), from_source)
    width = max(4, len(str(len(picked))))
    for n, row in enumerate(rows, 1):
        row = {key: value for key, value in row.items() if value is not None}
        source_id = row.pop("id", None)
        row = {"id": f"{recipe.name}-{date}-{n:0{width}}", **recipe.defaults, **row}
        row.setdefault("seed", _draw(2**32, "row", recipe.seed, recipe.name, date, n))
        if source_id is not None:
            row["source_id"] = source_id
        yield row


def _dumps(what: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {value!r}, must be a JSON value ({error})") from None


def manifest_bytes(rows: Iterator[Row]) -> bytes:
    """Rows as JSONL in UTF-8, one object per line, keys in the order of the rows."""
    return "".join(_dumps(row.get("id", "row"), row) + "\n" for row in rows).encode()


# ---- rows of an existing manifest ---------------------------------------------------------------------


class SourceManifest:
    """A manifest (JSONL, a Parquet file or a folder of them) whose rows are counted first and read when picked.

    Raises ValueError when it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow import dataset, fs

        self.uri = uri
        #: Whether a row that was taken has images; known once the rows are taken.
        self.has_images = False
        self._take: Callable[[Sequence[int]], Iterator[Row]] = self._take_lines
        self._is_folder = False
        self._fs: fs.FileSystem
        self._path: str
        try:
            self._fs, self._path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
            if uri.endswith((".jsonl", ".json")):
                self._length = sum(1 for _ in self._lines())
            else:
                parquet = dataset.dataset(self._path, filesystem=self._fs, format="parquet")
                self._length = parquet.count_rows()
                self._is_folder = self._fs.get_file_info(self._path).type == fs.FileType.Directory
                self._take = lambda indices: iter(parquet.take(indices).to_pylist() if indices else ())
        except (OSError, ValueError) as error:
            raise ValueError(f"manifest: {uri!r}, must be readable JSONL or Parquet ({error})") from None

    def __len__(self) -> int:
        return self._length

    @property
    def folder(self) -> str:
        """The folder that the manifest's relative image paths are relative to."""
        return self.uri if self._is_folder else self.uri.rpartition("/")[0]

    def take(self, indices: Sequence[int]) -> Iterator[Row]:
        """The rows at these ascending indices.

        Relative image paths become absolute, because the manifest of the date lies in another folder.
        """
        for row in self._take(indices):
            if row.get("images"):
                self.has_images = True
                row["images"] = [self._absolute(image) for image in row["images"]]
            yield row

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, text) of every line that is not blank."""
        with io.TextIOWrapper(self._fs.open_input_stream(self._path), encoding="utf-8") as text:
            yield from ((n, line) for n, line in enumerate(text, 1) if line.strip())

    def _take_lines(self, indices: Sequence[int]) -> Iterator[Row]:
        picked = set(indices)
        for index, (n, line) in enumerate(self._lines()):
            if index not in picked:
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.uri}:{n}: {error}") from None
            require(f"{self.uri}:{n}", row, isinstance(row, dict), "a JSON object")
            yield row

    def _absolute(self, image: Any) -> Any:
        path = image.get("path") if isinstance(image, dict) else None
        if not isinstance(path, str) or "://" in path or path.startswith("/"):
            return image  # the render reports it when it is illegal
        return {**image, "path": f"{self.folder}/{path}"}
