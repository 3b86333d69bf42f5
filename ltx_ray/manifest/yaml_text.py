"""YAML in which every scalar is the text that stands in the file.

YAML makes numbers, truths, dates and times of plain words by rules that differ between its versions: 12:30 is 750 in
YAML 1.1, 0750 is 488, `off` is false. Here the parser's structure counts and its guesses do not. Whoever takes a value
converts it by the type of the option or of the column that it is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

#: Plain words for a value that is not given. In quotes they are text.
_NOTHING = ("", "~", "null", "Null", "NULL")
_PREFIX = "tag:yaml.org,2002:"
#: The tag that the loader below gives to plain scalars; tags of a file never look like this.
_PLAIN = "plain"
_LEGAL_TAGS = (_PLAIN, f"{_PREFIX}str", f"{_PREFIX}seq", f"{_PREFIX}map")
#: Most values of a file, with every alias counted as what it stands for.
MOST_VALUES = 5_000_000

Content: TypeAlias = "str | tuple[YamlNode, ...] | dict[str, YamlNode]"


@dataclass(frozen=True)
class YamlNode:
    """A value in a YAML file: a text, a list or a mapping.

    `line` counts from 1. `plain` says whether a text stands there without quotes, block marks or a tag. `size` is the
    number of values in it, itself included.
    """

    content: Content
    line: int
    plain: bool = False
    size: int = 1

    @property
    def is_nothing(self) -> bool:
        """Whether this is a value that is not given: nothing, or a plain `~` or `null`."""
        return self.plain and self.content in _NOTHING

    @property
    def data(self) -> Any:
        """The value as texts, lists and dicts; None for one that is not given."""
        if isinstance(self.content, dict):
            return {key: node.data for key, node in self.content.items()}
        if isinstance(self.content, tuple):
            return [node.data for node in self.content]
        return None if self.is_nothing else self.content


def read_yaml(text: str) -> YamlNode:
    """The document in a YAML file's text.

    A text without content is a value that is not given. Anchors, aliases and merge keys (`<<`) are resolved. Raises
    ValueError with the line for what is no YAML, and for several documents, a key that stands twice, a key that is no
    text, a tag, and an anchor that contains itself or stands for very much.
    """
    try:
        root = yaml.compose(text, Loader=_TextLoader)
        return YamlNode("", 1, plain=True) if root is None else _Builder().node(root)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character U+{error.character:04X}, which YAML does not allow") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1 if mark else 1}: {' '.join(_problem(error).split())}") from None
    except RecursionError:
        raise ValueError("lists or mappings that are nested too deeply") from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    if "\\t" in (error.problem or ""):
        return "a tab between words or before them; legal: blanks"
    if isinstance(error, yaml.composer.ComposerError) and "single document" in (error.context or ""):
        return "a second document begins; legal: one document"
    return f"{error.context}: {error.problem}" if error.context else str(error.problem)


class _TextLoader(yaml.BaseLoader):
    """PyYAML's parser with every rule off by which it guesses types."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else f"{_PREFIX}str"
        return f"{_PREFIX}seq" if kind is yaml.SequenceNode else f"{_PREFIX}map"


class _Builder:
    """Makes YamlNodes of the parser's. What several aliases share is made once."""

    def __init__(self) -> None:
        #: By the parser's node; None while it is being made.
        self._made: dict[yaml.Node, YamlNode | None] = {}

    def node(self, given: yaml.Node) -> YamlNode:
        line = given.start_mark.line + 1
        if given in self._made:
            if (made := self._made[given]) is None:
                raise ValueError(f"line {line}: an anchor whose value contains its own alias")
            return made
        if given.tag not in _LEGAL_TAGS:
            tag = given.tag.replace(_PREFIX, "!!")
            raise ValueError(f"line {line}: the tag {tag}; legal: values without tags, text in quotes")
        self._made[given] = None
        content, inner = self._content(given)
        node = YamlNode(content, line, given.tag == _PLAIN, 1 + sum(part.size for part in inner))
        if node.size > MOST_VALUES:
            raise ValueError(f"line {line}: aliases that stand for more than {MOST_VALUES} values")
        self._made[given] = node
        return node

    def _content(self, given: yaml.Node) -> tuple[Content, Iterator[YamlNode]]:
        """What the node holds, and the nodes in it."""
        if isinstance(given, yaml.ScalarNode):
            return given.value, iter(())
        if isinstance(given, yaml.SequenceNode):
            items = tuple(map(self.node, given.value))
            return items, iter(items)
        mapping = self._mapping(given)
        return mapping, iter(mapping.values())

    def _mapping(self, given: yaml.Node) -> dict[str, YamlNode]:
        own: dict[str, YamlNode] = {}
        lines: dict[str, int] = {}
        merged: dict[str, YamlNode] = {}
        for key_node, value_node in given.value:
            line = key_node.start_mark.line + 1
            key, value = self.node(key_node), self.node(value_node)
            if not isinstance(key.content, str):
                raise ValueError(f"line {line}: a key that is a list or a mapping; legal: text (a {{ begins a mapping)")
            if key.content in lines:
                earlier = lines[key.content]
                raise ValueError(f"line {line}: the key {key.content!r} for the second time, after line {earlier}")
            lines[key.content] = line
            if key.plain and key.content == "<<":
                merged = _merged(value)
            else:
                own[key.content] = value
        return {**merged, **own}


def _merged(value: YamlNode) -> dict[str, YamlNode]:
    """The keys that `<<: value` adds. The first of several mappings that has a key gives its value."""
    mappings = value.content if isinstance(value.content, tuple) else (value,)
    merged: dict[str, YamlNode] = {}
    for mapping in reversed(mappings):
        if not isinstance(mapping.content, dict):
            raise ValueError(f"line {value.line}: <<: {mapping.data!r}; legal: an alias of a mapping, or several")
        merged.update(mapping.content)
    return merged
