"""The recipe of a schedule: what is in it, and the manifest rows that it comes to on a date.

Everything here gives the same result for the same recipe and date, on any machine and Python version.
The recipe's fields are described in schedule.py, which is what people run.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The manifest's optional fields (Manifest in the design); `id` and `prompt` come from the recipe.
ROW_FIELDS = frozenset(
    "negative_prompt seed height width num_frames frame_rate num_inference_steps pipeline loras images "
    "distilled_lora_strength_stage_1 distilled_lora_strength_stage_2".split()
    + [
        f"{kind}_{name}"
        for kind in ("video", "audio")
        for name in ("cfg_scale", "stg_scale", "rescale_scale", "modality_scale", "stg_blocks", "skip_step")
    ]
)
RECIPE_FIELDS = (
    "name",
    "output",
    "prompts",
    "variables",
    "manifest",
    "count",
    "seed",
    "defaults",
    "render_options",
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Beyond this an absent `count` is more likely a product that got out of hand than a wish.
MOST_WITHOUT_COUNT = 100_000


# ---- the recipe --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Template:
    """A prompt with {variables}: its text, and the variables in it in order of first use."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; the fields are those of the module's docstring."""

    name: str
    output: str
    templates: tuple[Template, ...] = ()
    variables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    manifest: str | None = None
    count: int | None = None
    seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    render_options: tuple[str, ...] = ()


def need(what: str, value: Any, ok: bool, legal: str) -> None:
    """Raise ValueError naming what, its value and what is legal, unless ok."""
    if not ok:
        raise ValueError(f"{what}: {value!r}, must be {legal}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _placeholders(what: str, text: str, legal: Sequence[str]) -> tuple[str, ...]:
    """Names of the {placeholders} in text, each once. Raises ValueError for one that is not in `legal`."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{what}: {text!r}, {error} (write '{{{{' for a literal brace)") from None
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if name not in legal or spec or conversion:
            shown = "{" + name + ("!" + conversion if conversion else "") + (":" + spec if spec else "") + "}"
            known = ", ".join("{" + n + "}" for n in legal) or "none are defined"
            raise ValueError(f"{what}: {shown} in {text!r} is no known variable; known: {known}")
        if name not in names:
            names.append(name)
    return tuple(names)


def parse_recipe(text: str, folder: str = ".") -> Recipe:
    """YAML text to a Recipe; a relative `manifest` is taken from `folder`.

    Raises ValueError naming the field, its value and what is legal.
    """
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from None
    need("recipe", data, isinstance(data, dict), "a mapping of fields")
    for key in data:
        need("unknown field", key, key in RECIPE_FIELDS, "one of " + ", ".join(RECIPE_FIELDS))
    for key in ("name", "output"):
        need(key, data.get(key), data.get(key) is not None, "given")
    name, output = data["name"], data["output"]
    need(
        "name",
        name,
        isinstance(name, str) and bool(NAME.fullmatch(name)),
        "text of 1 to 64 letters, digits, '.', '_' and '-' that begins with a letter or digit",
    )
    need("output", output, isinstance(output, str) and bool(output.strip()), "a path or URI")
    _placeholders("output", output, ("date", "name"))

    variables = data.get("variables") or {}
    need("variables", variables, isinstance(variables, dict), "a mapping of name to list")
    for key, values in variables.items():
        need("variables", key, isinstance(key, str) and key.isidentifier(), "a name like animal or time_of_day")
        need(
            f"variables.{key}",
            values,
            isinstance(values, list) and bool(values) and all(isinstance(v, str) or _is_int(v) for v in values),
            "a list of at least one text or whole number",
        )
    prompts = data.get("prompts") or []
    need(
        "prompts",
        prompts,
        isinstance(prompts, list) and all(isinstance(p, str) and p.strip() for p in prompts),
        "a list of texts that are not blank",
    )
    templates = tuple(Template(p, _placeholders(f"prompts[{i}]", p, tuple(variables))) for i, p in enumerate(prompts))
    used = {name for template in templates for name in template.names}
    for key in variables:
        need("variables", key, key in used, "used as {" + key + "} by one of the prompts")

    manifest = data.get("manifest")
    need(
        "manifest",
        manifest,
        manifest is None or (isinstance(manifest, str) and bool(manifest)),
        "a path or URI",
    )
    need("prompts", prompts, bool(prompts or manifest), "given, or `manifest`, or both")
    if manifest and "://" not in manifest:
        manifest = os.path.abspath(os.path.join(folder, os.path.expanduser(manifest)))

    count, seed = data.get("count"), data.get("seed")
    need("count", count, count is None or (_is_int(count) and count > 0), "a whole number of at least 1")
    need("seed", seed, seed is None or (_is_int(seed) and 0 <= seed < 2**63), "a whole number, 0 to 2^63-1")

    defaults = data.get("defaults") or {}
    need("defaults", defaults, isinstance(defaults, dict), "a mapping of row fields")
    for key, value in defaults.items():
        need("defaults", key, key in ROW_FIELDS, "one of " + ", ".join(sorted(ROW_FIELDS)))
        _dumps(f"defaults.{key}", value)

    options = data.get("render_options") or []
    need(
        "render_options",
        options,
        isinstance(options, list) and all(isinstance(o, str | float) or _is_int(o) for o in options),
        "a list of texts and numbers",
    )
    options = tuple(str(o) for o in options)
    for option in options:
        need(
            "render_options",
            option,
            option.split("=")[0] != "--output",
            "without --output: the recipe has `output`",
        )
    return Recipe(name, output, templates, variables_as_text(variables), manifest, count, seed or 0, defaults, options)


def variables_as_text(variables: Mapping[str, Sequence[Any]]) -> dict[str, tuple[str, ...]]:
    """Every value as the text that goes into a prompt."""
    return {key: tuple(str(v) for v in values) for key, values in variables.items()}


# ---- rows --------------------------------------------------------------------------------------------


def _draw(limit: int, *key: Any) -> int:
    """A whole number in [0, limit) from the key: sha256, as Python's `random` may change between versions."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest, "big") % limit


def sample(total: int, count: int, *key: Any) -> list[int]:
    """`count` different numbers of range(total), ascending.

    A Fisher-Yates shuffle that holds only what it moves, so that total may be a huge product.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        j = i + _draw(total - i, *key, i)
        moved[i], moved[j] = moved.get(j, j), moved.get(i, i)
    return sorted(moved[i] for i in range(count))


def _size(recipe: Recipe, template: Template) -> int:
    return math.prod(len(recipe.variables[name]) for name in template.names)


def _expand_one(recipe: Recipe, index: int) -> dict[str, Any]:
    """Row number `index` of all the templates' expansions; the last variable of a template turns fastest."""
    for template in recipe.templates:
        size = _size(recipe, template)
        if index < size:
            break
        index -= size
    chosen: dict[str, str] = {}
    for name in reversed(template.names):
        values = recipe.variables[name]
        index, k = divmod(index, len(values))
        chosen[name] = values[k]
    chosen = {name: chosen[name] for name in template.names}
    row: dict[str, Any] = {"prompt": template.text.format(**chosen)}
    return {**row, "variables": chosen} if chosen else row


def expand(recipe: Recipe, date: str, source: Source | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one date, in manifest order, as dicts of JSON values without nulls.

    `source` holds the rows of the recipe's manifest. Raises ValueError if fewer than `count` rows are there,
    or if there are very many and no `count`.
    """
    made = sum(_size(recipe, t) for t in recipe.templates)
    total = made + (len(source) if source else 0)
    if recipe.count is None:
        need("count", None, total <= MOST_WITHOUT_COUNT, f"given, as the recipe expands to {total} rows")
        picked: Sequence[int] = range(total)
    else:
        need("count", recipe.count, recipe.count <= total, f"at most {total}, the rows the recipe expands to")
        picked = sample(total, recipe.count, "sample", recipe.seed, recipe.name, date)
    need("recipe", recipe.name, len(picked) > 0, "one that gives at least one row")
    drawn = source.take([i - made for i in picked if i >= made]) if source else iter(())
    rows = itertools.chain((_expand_one(recipe, i) for i in picked if i < made), drawn)
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


def manifest_bytes(rows: Iterator[dict[str, Any]]) -> bytes:
    """Rows as JSONL in UTF-8, one object a line, keys in the rows' order."""
    return "".join(_dumps(row.get("id", "row"), row) + "\n" for row in rows).encode()


# ---- rows of an existing manifest ---------------------------------------------------------------------


class Source:
    """Rows of a manifest (JSONL; a Parquet file or folder), counted first and then read only where picked.

    Raises ValueError if it cannot be read.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow import dataset, fs

        self.uri = uri
        try:
            self._fs, self._path = fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), uri)
            self._parquet = None
            if uri.endswith((".jsonl", ".json")):
                self._length = sum(1 for _ in self._lines())
            else:
                self._parquet = dataset.dataset(self._path, filesystem=self._fs, format="parquet")
                self._length = self._parquet.count_rows()
        except (OSError, ValueError) as error:
            raise ValueError(f"manifest: {uri!r}, must be JSONL or Parquet that can be read ({error})") from None
        self.has_images = False

    def __len__(self) -> int:
        return self._length

    @property
    def folder(self) -> str:
        """Where relative image paths of the manifest start."""
        if self._parquet is not None and self._fs.get_file_info(self._path).type.name == "Directory":
            return self.uri
        return self.uri.rpartition("/")[0]

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(line number from 1, text) of every line that is not blank."""
        with io.TextIOWrapper(self._fs.open_input_stream(self._path), encoding="utf-8") as text:
            yield from ((n, line) for n, line in enumerate(text, 1) if line.strip())

    def take(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at these ascending places, with relative image paths made absolute, as the dated
        manifest lies elsewhere."""
        if self._parquet is not None:
            rows: Iterator[dict[str, Any]] = iter(self._parquet.take(indices).to_pylist()) if indices else iter(())
        else:
            rows = self._json_rows(set(indices))
        for row in rows:
            if row.get("images"):
                self.has_images = True
                row["images"] = [self._absolute(image) for image in row["images"]]
            yield row

    def _json_rows(self, wanted: set[int]) -> Iterator[dict[str, Any]]:
        for place, (n, line) in enumerate(self._lines()):
            if place not in wanted:
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.uri}:{n}: {error}") from None
            need(f"{self.uri}:{n}", row, isinstance(row, dict), "a JSON object")
            yield row

    def _absolute(self, image: Any) -> Any:
        path = image.get("path") if isinstance(image, dict) else None
        if not isinstance(path, str) or "://" in path or path.startswith("/"):
            return image  # if it is illegal, the render says so
        return {**image, "path": f"{self.folder}/{path}"}
