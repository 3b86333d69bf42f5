"""Options and arguments of the `ltx-ray` command: types that check values, and a help page in sections.

A value that is not legal raises ValueError with the option, the value and what is legal, as every message does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
from click.core import ParameterSource

from ltx_ray.config import LoraSpec
from ltx_ray.manifest.columns import float32_holds
from ltx_ray.storage.hub import SCHEME, hub_location
from ltx_ray.storage.locations import resolve
from ltx_ray.storage.text import read_text

LORA = "--lora"
#: More digits than any number of replicas, rows or blocks has. Python reads no more than 4300.
_MOST_DIGITS = 18
#: Width of the column of options in a help page. A longer option has its text below it.
_OPTIONS_WIDTH = 32


def _name(param: click.Parameter | None) -> str:
    assert param is not None
    return param.opts[0].lstrip("-")


def _shown_name(param: click.Parameter | None) -> str:
    """An option with its dashes, an argument in capitals, as the help page has them."""
    assert param is not None
    return param.opts[0] if param.opts[0].startswith("-") else param.opts[0].upper()


# --- types -------------------------------------------------------------------------------------------------------


class OneOf(click.ParamType):
    name = "choice"

    def __init__(self, *legal: str):
        self._legal = legal

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self._legal:
            raise ValueError(f"--{_name(param)}: {value!r}, legal: {' or '.join(self._legal)}")
        return str(value)


class Whole(click.ParamType):
    """A whole number."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return int(_number(value, param, int, "a whole number"))


def _number(value: Any, param: click.Parameter | None, kind: type[int] | type[float], legal: str) -> int | float:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"--{_name(param)}: {value!r}, legal: {legal}") from None


def _is_whole(text: str) -> bool:
    """Whether `text` is a whole number from 0, of digits alone."""
    return text.isdecimal() and len(text) <= _MOST_DIGITS


class AtLeast(click.ParamType):
    """A number of the type of `least`."""

    name = "number"

    def __init__(self, least: int | float):
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        number = _number(value, param, type(self._least), f"a number from {self._least:g}")
        if not number >= self._least:
            raise ValueError(f"--{_name(param)}: {number}, legal: a number from {self._least:g}")
        return number


class ReplicaCount(click.ParamType):
    """A number of replicas; "auto" is None."""

    name = "replicas"

    def __init__(self, least: int):
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        text = str(value)
        if text == "auto":
            return None
        if not _is_whole(text) or int(text) < self._least:
            raise ValueError(f"--{_name(param)}: {text!r}, legal: auto or a number from {self._least}")
        return int(text)


class Fraction(click.ParamType):
    name = "fraction"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = _number(value, param, float, "a part of the rows, from 0 to 1")
        if not 0 <= number <= 1:
            raise ValueError(f"--{_name(param)}: {number}, legal: a part of the rows, from 0 to 1")
        return number


class BlockNumbers(click.ParamType):
    """Numbers of transformer blocks with commas or blanks between them."""

    name = "blocks"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        parts = str(value).replace(",", " ").split()
        if not all(map(_is_whole, parts)):
            raise ValueError(f"--{_name(param)}: {value!r}, legal: block numbers, such as 28,29")
        return [int(part) for part in parts]


class Location(click.ParamType):
    """A path or URI as the location that it means."""

    name = "location"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return self.resolve(str(value))
        except ValueError as error:
            raise ValueError(f"{_shown_name(param)}: {error}") from None

    def resolve(self, text: str) -> str:
        return resolve(text)


class ModelLocation(Location):
    """A location, or a file or folder of the Hugging Face Hub."""

    def resolve(self, text: str) -> str:
        return hub_location(text) if text.startswith(SCHEME) else resolve(text)


class IdsFile(click.ParamType):
    """The ids in a text file, one per line."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[str]:
        try:
            lines = read_text(value).split("\n")
        except ValueError as error:
            raise ValueError(f"--ids: {value}, cannot be read ({error})") from None
        return frozenset(line.strip() for line in lines if line.strip())


class Shard(click.ParamType):
    """`I/N` as (I, N)."""

    name = "shard"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        index, _, count = str(value).partition("/")
        if not (_is_whole(index) and _is_whole(count) and int(index) < int(count)):
            raise ValueError(f"--{_name(param)}: {value!r}, legal: I/N with I from 0 to N-1")
        return int(index), int(count)


class Date(click.ParamType):
    """A date, or a date with a time; UTC where it names no zone."""

    name = "date"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise ValueError(
                f"--{_name(param)}: {value!r}, legal: a date such as 2026-11-30 or 2026-11-30T02:00"
            ) from None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class PathAndStrength(click.ParamType):
    """A LoRA's path and its strength, which `with_lora_strengths` has added where the user gave none."""

    name = "lora"
    is_composite = True
    arity = 2

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        path, strength = value
        if not (_is_number(strength) and float32_holds(float(strength))):
            raise ValueError(f"--lora: {path} {strength}, legal: a finite number as its strength, which float32 holds")
        # -0.0 would give another item_id than 0.0, which it becomes in a row.
        return ModelLocation().convert(path, param, ctx), float(strength) + 0.0


def with_lora_strengths(arguments: Sequence[str]) -> list[str]:
    """`arguments` in which every `--lora PATH` has its strength behind it.

    Options have a fixed number of values for click's parser, and `--lora PATH [STRENGTH]` has one or two.
    """
    rest, result = list(arguments), []
    while rest:
        argument = rest.pop(0)
        result.append(argument)
        if argument == LORA:
            if not rest:
                raise click.BadOptionUsage(LORA, f"Option '{LORA}' requires an argument.")
            result.append(rest.pop(0))
        elif not argument.startswith(f"{LORA}="):
            continue
        result.append(rest.pop(0) if rest and _is_number(rest[0]) else str(LoraSpec.strength))
    return result


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True


# --- options, their config file and the help page ----------------------------------------------------------------


@dataclass(frozen=True)
class ConfigValue:
    """What a config file says of an option: its value, as the command line would have it, and where it stands."""

    value: Any
    file: str
    line: int

    def refused(self, why: str) -> ValueError:
        """The error of a value that is not legal. `why` names the option, the value and what is legal."""
        return ValueError(f"--config: {self.file}: {why} (line {self.line})")


class Option(click.Option):
    """An option in a section of the help page. Its text ends with its default, in brackets.

    Its error for a value that came from a config file names the file and the line.
    """

    #: The key in `Context.meta` of the values from a config file, by the name of the value.
    CONFIG = "ltx_ray.config"

    def __init__(
        self, *names: str, section: str, help: str, default: Any = None, shown: str | None = None, **more: Any
    ):
        """`names`: flags, and before them the name of the value where it is not that of the flag."""
        self.section = section
        default_text = shown or (f"{default:g}" if isinstance(default, float) else default)
        text = help if default is None or default is False else f"{help} [{default_text}]"
        if default is not None:  # For click, a default of None is a value, which a required option then has.
            more["default"] = default
        super().__init__(list(names), help=text, **more)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().type_cast_value(ctx, value)
        except ValueError as error:
            assert self.name is not None
            if ctx.get_parameter_source(self.name) != ParameterSource.DEFAULT_MAP:
                raise
            raise ctx.meta[Option.CONFIG][self.name].refused(str(error)) from None


class Argument(click.Argument):
    """An argument with a line on the help page."""

    def __init__(self, name: str, description: str, type: click.ParamType, **more: Any):
        super().__init__([name], type=type, **more)
        self.description = description


class Command(click.Command):
    """A command whose help page has the sections of its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        has_loras = any(LORA in param.opts for param in self.params)
        return super().parse_args(ctx, with_lora_strengths(args) if has_loras else args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, Argument):
                sections.setdefault("Arguments", []).append((param.make_metavar(ctx), param.description))
            elif (record := param.get_help_record(ctx)) is not None:
                section = param.section if isinstance(param, Option) else "Other"
                sections.setdefault(section, []).append(record)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows, col_max=_OPTIONS_WIDTH)
