"""YAML whose scalars are the text that stands in the file."""

from __future__ import annotations

import pytest

from ltx_ray.manifest.yaml_text import read_yaml

GUESSED = (
    "12:30 0750 0121 24:00 1:30 1_000 1e3 .5 0x10 0o17 0b1 +5 1.0 -0 .inf .nan yes no on off y n true False NO "
    "2026-11-23 2026-11-23T10:00:00Z 1.2.3 50% = <"
).split()


@pytest.mark.parametrize("text", GUESSED)
@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "!!str {}"])
def test_a_scalar_is_the_text_that_stands_there(text, form):
    assert read_yaml(f"key: {form.format(text)}").data == {"key": text}
    assert read_yaml(f"{form.format(text)}: key").data == {text: "key"}
    assert read_yaml(f"- {form.format(text)}\n- [{form.format(text)}]").data == [text, [text]]


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_a_plain_null_is_not_given_and_a_quoted_one_is_text(text):
    node = read_yaml(f"plain: {text}\nsingle: '{text}'\ndouble: \"{text}\"\ntagged: !!str {text}")
    assert node.data == {"plain": None, "single": text, "double": text, "tagged": text}


@pytest.mark.parametrize("source", ["", "\n", "# a comment", "---", "---\n...\n", "\ufeff"])
def test_a_file_without_content_is_not_given(source):
    assert read_yaml(source).is_nothing


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_a_text_as_editors_write_it(mark, ending):
    text = mark + "prompt: ein Fuchs, 狐 🦊\ntext: |\n  one\n  two\n".replace("\n", ending)
    assert read_yaml(text).data == {"prompt": "ein Fuchs, 狐 🦊", "text": "one\ntwo\n"}


def test_values_have_their_lines():
    node = read_yaml("# one\na: 1\n\nb:\n  - x\n  - {y: z}\n")
    assert (node.line, node.content["a"].line) == (2, 2)
    assert [part.line for part in node.content["b"].content] == [5, 6]


def test_anchors_and_merge_keys():
    node = read_yaml("base: &base {x: off, y: 1}\nother: &other {y: 2, z: 3}\nlist: [*base]\n"
                     "one: {<<: *base, y: 012}\nboth: {<<: [*base, *other]}\nquoted: {'<<': 1}\n")  # fmt: skip
    assert node.data["list"] == [{"x": "off", "y": "1"}]
    assert node.data["one"] == {"x": "off", "y": "012"}
    assert node.data["both"] == {"x": "off", "y": "1", "z": "3"}
    assert node.data["quoted"] == {"<<": "1"}


@pytest.mark.parametrize(
    "source, words",
    [
        ("a: 1\nb: [", "line 2: "),
        ("a: 'x", "line 1: "),
        ("a: b: c", "line 1: mapping values are not allowed here"),
        ("x: 1\na:\t1", "line 2: a tab between words or before them; legal: blanks"),
        ("x: 1\n\ta: 1", "line 2: a tab between words or before them; legal: blanks"),
        ("a: 1\n---\nb: 2", "line 2: a second document begins; legal: one document"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' for the second time, after line 1"),
        ("x: {a: 1, 'a': 2}", "line 1: the key 'a' for the second time, after line 1"),
        ("x: 1\na: !!python/object/apply:os.system [ls]", "line 2: the tag !!python/object/apply:os.system; legal: "),
        ("a: !!int 3", "line 1: the tag !!int; legal: "),
        ("a: !include x.yaml", "line 1: the tag !include; legal: "),
        ("a: &x [*x]", "line 1: an anchor whose value contains its own alias"),
        ("a: *nowhere", "line 1: found undefined alias"),
        ("x: 1\n{a}: 1", "line 2: "),
        ("? [a]\n: 1", "line 1: a key that is a list or a mapping"),
        ("a: {<<: 3}", "line 1: <<: '3'; legal: an alias of a mapping"),
        ("a: x\nb: \x07", "line 2: the character U+0007, which YAML does not allow"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\nb\0: 2", "line 2: the character U+0000, which YAML does not allow"),
    ],
)
def test_what_is_refused(source, words):
    with pytest.raises(ValueError) as error:
        read_yaml(source)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_aliases_of_aliases_cost_nothing():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    with pytest.raises(ValueError, match="line 7: aliases that stand for more than"):
        read_yaml("\n".join(lines))
