"""`--config FILE.yaml`: options by their names, as defaults of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import yaml

from ltx_ray.cli.parameters import LORA
from ltx_ray.config import LoraSpec
from ltx_ray.storage.text import read_text


def read_config(path: str, options: Sequence[click.Option]) -> dict[str, Any]:
    """Values of `options` in the file at `path`, by the name of the value.

    Each is the text that the command line would have, so that the option's own type converts and checks it. Raises
    ValueError for a file that is no mapping of options.
    """
    by_flag = {option.opts[0].removeprefix("--"): option for option in options}
    values: dict[str, Any] = {}
    for key, value in _read_mapping(path).items():
        option = by_flag.get(str(key).replace("_", "-"))
        if option is None:
            raise ValueError(f"--config: {path}: unknown option {key!r}; legal: {', '.join(sorted(by_flag))}")
        assert option.name is not None
        if value is not None:
            values[option.name] = _option_value(path, option, value)
    return values


def _read_mapping(path: str) -> Mapping[Any, Any]:
    try:
        content = yaml.safe_load(read_text(path)) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path}, cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config: {path}, holds no mapping; legal: option names and their values")
    return content


def _option_value(path: str, option: click.Option, value: Any) -> Any:
    if LORA in option.opts:
        return [_path_and_strength(path, entry) for entry in _as_list(value)]
    if option.multiple:
        return [_text(entry) for entry in _as_list(value)]
    return ",".join(map(_text, value)) if isinstance(value, list) else _text(value)


def _path_and_strength(path: str, entry: Any) -> tuple[str, str]:
    if isinstance(entry, str):
        return entry, str(LoraSpec.strength)
    if not isinstance(entry, dict) or "path" not in entry or set(entry) - {"path", "strength"}:
        raise ValueError(f"--config: {path}: lora: {entry}, legal: a path, or {{path, strength}}")
    return _text(entry["path"]), _text(entry.get("strength", LoraSpec.strength))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    """A scalar as the command line would have it."""
    return str(value)
