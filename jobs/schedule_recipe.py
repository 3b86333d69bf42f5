"""The recipe of a schedule: its fields, and the manifest rows it expands to on a date.

Everything here gives the same result for the same recipe and date, on any machine and Python version.
schedule.py, the program, describes the fields of a recipe.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

# The machine that submits needs a clone, which need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltx_ray.manifest.columns import COLUMNS, Mistyped
from ltx_ray.manifest.text_values import legal_value
from ltx_ray.manifest.yaml_text import YamlNode, read_yaml
from ltx_ray.storage.locations import resolve

Row = dict[str, Any]

#: Optional fields of a manifest row (docs/manifest.md); the recipe itself gives `id` and `prompt`.
ROW_FIELDS = COLUMNS.keys() - {"id", "prompt"}
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


def require(what: str, value: Any, ok: bool, legal: str, line: int | None = None) -> None:
    """Raise ValueError with the field, its value, what is legal and the recipe's line, unless `ok`."""
    if not ok:
        raise ValueError(f"{what}: {value!r}, must be {legal}" + (f" (line {line})" if line else ""))


def parse_recipe(text: str, folder: str = ".") -> Recipe:
    """Parse YAML; a relative `manifest` is resolved against `folder`.

    Every value is the text that stands there, and numbers are what they look like. Raises ValueError with the field,
    its value and what is legal.
    """
    try:
        root = read_yaml(text)
    except ValueError as error:
        raise ValueError(f"not YAML: {error}") from None
    require("recipe", root.data, isinstance(root.content, dict), "a mapping of fields")
    fields = cast(dict[str, YamlNode], root.content)
    for key, node in fields.items():
        require("unknown field", key, key in RECIPE_FIELDS, "one of " + ", ".join(RECIPE_FIELDS), node.line)
    given = {key: node for key, node in fields.items() if not node.is_nothing}
    name, output = _parse_name_and_output(given)
    variables = _parse_variables(given.get("variables"))
    manifest = _parse_manifest(given.get("manifest"), folder)
    return Recipe(
        name,
        output,
        _parse_prompts(given.get("prompts"), variables, optional=manifest is not None),
        variables,
        manifest,
        _parse_count(given.get("count")),
        _parse_seed(given.get("seed")),
        _parse_defaults(given.get("defaults")),
        _parse_render_options(given.get("render_options")),
    )


def _parse_count(node: YamlNode | None) -> int | None:
    count = None if node is None else _whole(node)
    if node is not None:
        shown = node.data if count is None else count
        require("count", shown, count is not None and count > 0, "a whole number of at least 1", node.line)
    return count


def _parse_seed(node: YamlNode | None) -> int:
    if node is None:
        return 0
    seed = _whole(node)
    shown = node.data if seed is None else seed
    require("seed", shown, seed is not None and 0 <= seed < 2**63, "a whole number, 0 to 2^63-1", node.line)
    return cast(int, seed)


def _whole(node: YamlNode) -> int | None:
    try:
        return int(cast(str, node.content))
    except (TypeError, ValueError):
        return None


def _list_of_texts(what: str, node: YamlNode) -> list[str]:
    """The texts of a list, in which `null` and `~` are words like others."""
    texts = []
    for i, entry in enumerate(cast(tuple[YamlNode, ...], node.content)):
        require(
            f"{what}[{i}]",
            entry.data,
            isinstance(entry.content, str) and bool(entry.content or not entry.plain),
            "text, in quotes where it is empty, holds ': ' or begins with '{' or '['",
            entry.line,
        )
        texts.append(cast(str, entry.content))
    return texts


def _parse_name_and_output(given: Mapping[str, YamlNode]) -> tuple[str, str]:
    for key in ("name", "output"):
        require(key, None, key in given, "given")
    (name, line), (output, output_line) = ((given[key].content, given[key].line) for key in ("name", "output"))
    require(
        "name",
        given["name"].data,
        isinstance(name, str) and bool(NAME.fullmatch(name)),
        "a string of 1 to 64 letters, digits, '.', '_' and '-' that begins with a letter or digit",
        line,
    )
    legal = isinstance(output, str) and bool(output.strip())
    require("output", given["output"].data, legal, "a path or URI", output_line)
    _placeholders("output", cast(str, output), ("date", "name"))
    return cast(str, name), cast(str, output)


def _parse_variables(node: YamlNode | None) -> dict[str, tuple[str, ...]]:
    """Each variable's values, as the text that goes into a prompt."""
    if node is None:
        return {}
    require("variables", node.data, isinstance(node.content, dict), "a mapping of name to list", node.line)
    variables = {}
    for key, values in cast(dict[str, YamlNode], node.content).items():
        require("variables", key, key.isidentifier(), "a name like animal or time_of_day", values.line)
        legal = isinstance(values.content, tuple) and bool(values.content)
        require(f"variables.{key}", values.data, legal, "a list of at least one string or number", values.line)
        variables[key] = tuple(_list_of_texts(f"variables.{key}", values))
    return variables


def _parse_prompts(node: YamlNode | None, variables: Mapping[str, Any], optional: bool) -> tuple[PromptTemplate, ...]:
    prompts: list[str] = []
    if node is not None:
        legal = isinstance(node.content, tuple)
        require("prompts", node.data, legal, "a list of strings that are not blank", node.line)
        prompts = _list_of_texts("prompts", node)
        require("prompts", prompts, all(map(str.strip, prompts)), "a list of strings that are not blank", node.line)
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


def _parse_manifest(node: YamlNode | None, folder: str) -> str | None:
    if node is None:
        return None
    require("manifest", node.data, isinstance(node.content, str) and bool(node.content), "a path or URI", node.line)
    try:
        return resolve(cast(str, node.content), folder)
    except ValueError as error:
        raise ValueError(f"manifest: {error}") from None


def _parse_defaults(node: YamlNode | None) -> dict[str, Any]:
    """JSON values by column, without those that are not given."""
    if node is None:
        return {}
    require("defaults", node.data, isinstance(node.content, dict), "a mapping of row fields", node.line)
    defaults = {}
    for key, value in cast(dict[str, YamlNode], node.content).items():
        require("defaults", key, key in ROW_FIELDS, "one of " + ", ".join(sorted(ROW_FIELDS)), value.line)
        if value.is_nothing:
            continue
        try:
            defaults[key] = legal_value(COLUMNS[key], value.data)
        except Mistyped:
            require(f"defaults.{key}", value.data, False, COLUMNS[key].legal, value.line)
    return defaults


def _parse_render_options(node: YamlNode | None) -> tuple[str, ...]:
    if node is None:
        return ()
    legal = isinstance(node.content, tuple)
    require("render_options", node.data, legal, "a list of strings and numbers", node.line)
    words = tuple(_list_of_texts("render_options", node))
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


class Pool(Protocol):
    """Rows that a recipe draws from: schedule_pool.SourceManifest."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Iterator[Row]: ...


def expand(recipe: Recipe, date: str, source: Pool | None = None) -> Iterator[Row]:
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
        # the render reports the row of a number that is infinite
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {value!r}, must be a JSON value ({error})") from None


def manifest_bytes(rows: Iterator[Row]) -> bytes:
    """Rows as JSONL in UTF-8, one object per line, keys in the order of the rows."""
    return b"".join(_line(_dumps(row.get("id", "row"), row)) for row in rows)


def _line(text: str) -> bytes:
    """A line of JSON. Text that is not UTF-8 stays as JSON escapes it, and the render reports its row."""
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(json.loads(text))}\n".encode()
