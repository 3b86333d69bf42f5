"""`--config FILE.yaml`: options by their names, as defaults of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from ltx_ray.cli.parameters import LORA, BlockNumbers, ConfigValue
from ltx_ray.config import LoraSpec
from ltx_ray.manifest.yaml_text import YamlNode, read_yaml
from ltx_ray.storage.text import read_text


def read_config(path: str, options: Iterable[click.Option]) -> dict[str, ConfigValue]:
    """What the file at `path` says of `options`, by the name of the value.

    A value is the text that stands in the file, so that the option's own type converts and checks it; a switch is a
    bool. Options without a value are left out. Raises ValueError for a file that is no mapping of options.
    """
    by_flag = {flag.removeprefix("--"): option for option in options for flag in (*option.opts, *option.secondary_opts)}
    found: dict[str, ConfigValue] = {}
    for key, node in _read_mapping(path).items():
        flag = key.replace("_", "-")
        option = by_flag.get(flag)
        if option is None:
            names = ", ".join(sorted(by_flag))
            raise ValueError(f"--config: {path}: unknown option {key!r}; legal: {names} (line {node.line})")
        if node.is_nothing:
            continue
        assert option.name is not None
        if option.name in found:
            earlier = found[option.name].line
            raise ValueError(f"--config: {path}: {key} in line {node.line}, but line {earlier} says it too; legal: one")
        value = _option_value(path, f"--{flag}", option, node)
        found[option.name] = ConfigValue(value, path, node.line)
    return found


def _read_mapping(path: str) -> dict[str, YamlNode]:
    try:
        root = read_yaml(read_text(path))
    except ValueError as error:
        raise ValueError(f"--config: {path}, cannot be read ({' '.join(str(error).split())})") from None
    if root.is_nothing:
        return {}
    if not isinstance(root.content, dict):
        raise ValueError(f"--config: {path}, holds no mapping; legal: option names and their values")
    return root.content


def _option_value(path: str, flag: str, option: click.Option, node: YamlNode) -> Any:
    given = ConfigValue(node.data, path, node.line)
    if LORA in option.opts:
        return [_path_and_strength(path, entry) for entry in _entries(node)]
    if option.is_flag:
        return _truth(given, flag) == (flag in option.opts)
    if option.multiple:
        return [_text(given, flag, entry) for entry in _entries(node)]
    if isinstance(option.type, BlockNumbers):
        return ",".join(_text(given, flag, entry) for entry in _entries(node))
    return _text(given, flag, node)


def _truth(given: ConfigValue, flag: str) -> bool:
    try:
        # click takes a text without content for a no.
        return click.BOOL.convert(given.value or None, None, None)
    except (AttributeError, click.BadParameter):
        raise given.refused(f"{flag}: {given.value!r}, legal: yes, no, true, false, on or off") from None


def _path_and_strength(path: str, entry: YamlNode) -> tuple[str, str]:
    strength = str(LoraSpec.strength)
    if isinstance(entry.content, str) and not entry.is_nothing:
        return entry.content, strength
    fields = entry.data if isinstance(entry.content, dict) else {}
    given = {name: value for name, value in fields.items() if value is not None}
    texts = all(isinstance(value, str) for value in given.values())
    if "path" not in given or set(fields) - {"path", "strength"} or not texts:
        given_as = ConfigValue(entry.data, path, entry.line)
        raise given_as.refused(f"lora: {entry.data}, legal: a path, or {{path, strength}}")
    return given["path"], given.get("strength", strength)


def _entries(node: YamlNode) -> tuple[YamlNode, ...]:
    return node.content if isinstance(node.content, tuple) else (node,)


def _text(given: ConfigValue, flag: str, node: YamlNode) -> str:
    """The text that stands in the file. In a list, words for a value that is not given are text too."""
    if not isinstance(node.content, str) or (node.plain and not node.content):
        raise given.refused(f"{flag}: {given.value!r}, legal: one value, or a list of them where it may be repeated")
    return node.content
