"""YAML as people write it: what is read as a number, what stays text, what is refused, and on which line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import yaml_text
from modelglue.errors import RecipeError
from modelglue.recipe import load_document, parse_document


def value_of(text: str) -> Any:
    return parse_document(text, "x.yaml").value


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "x.yaml")
    return str(caught.value)


# -- scalars ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # numbers that YAML 1.1 takes for text
        ("1e-3", 0.001), ("1E5", 100000.0), ("-2e3", -2000.0), ("+1e+2", 100.0), (".5e1", 5.0), ("1.e2", 100.0),
        # and those that it knows
        ("1.0e-3", 0.001), ("0.5", 0.5), ("-3", -3), ("1_000", 1000), ("0x10", 16), (".inf", math.inf), ("1e999", math.inf),
        # octal is a trap
        ("010", 10), ("-017", -17), ("0", 0), ("00", 0),
        # words are words
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("OFF", "OFF"), ("true", True), ("False", False),
        ("12:30", "12:30"), ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("2001-12-14t21:59:43Z", "2001-12-14t21:59:43Z"),
        ("inf", "inf"), ("-inf", "-inf"), ("nan", "nan"), ("-nan", "-nan"), ("1e", "1e"), ("e5", "e5"), ("7e3b", "7e3b"),
        ("'1e-3'", "1e-3"), ('"0.5"', "0.5"), ("'yes'", "yes"), ("'010'", "010"), ("org/name@1e5", "org/name@1e5"),
        # nothing
        ("null", None), ("~", None), ("", None),
    ],
)  # fmt: skip
def test_scalars(text: str, expected: Any) -> None:
    found = value_of(f"key: {text}")["key"]
    assert found == expected
    assert type(found) is type(expected)


def test_keys_are_text_whatever_they_look_like() -> None:
    assert value_of("1: a\nyes: b\n1e3: c\n2024-01-01: d\n'~': e") == {"1": "a", "yes": "b", "1e3": "c", "2024-01-01": "d", "~": "e"}


def test_collections() -> None:
    assert value_of("a: [1, {b: x}]\nc:\n  - d\n  -\n") == {"a": [1, {"b": "x"}], "c": ["d", None]}


def test_marks_of_other_systems() -> None:
    assert value_of("\ufeffa: 1\r\nb: 2\r\n") == {"a": 1, "b": 2}


# -- where things stand -----------------------------------------------------------------------------------------------------------


def test_places() -> None:
    document = parse_document("a: 1\nb:\n  - x\n  - c: 2\n    d: 3\n", "x.yaml")
    assert document.where(()) == "x.yaml:1"
    assert document.where(("b",)) == "x.yaml:2"
    assert document.where(("b", 0)) == "x.yaml:3"
    assert document.where(("b", 1, "d")) == "x.yaml:5"
    assert document.where(("b", 1, "not there", "at all")) == "x.yaml:4"
    assert document.fault(("b", 1, "d"), "is bad.") == "x.yaml:5: b[1].d: is bad."
    assert document.fault((), "is bad.") == "x.yaml:1: is bad."


def test_merge_keys_bring_in_what_a_mapping_does_not_say() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y {<<: *x, b: 3}\nz:\n  c: 4\n  <<: [*y, {a: 5, d: 6}]\n  a: 7\n"
    assert value_of(text)["z"] == {"c": 4, "a": 7, "b": 3, "d": 6}
    document = parse_document(text, "x.yaml")
    assert [document.where(("z", key)) for key in "abcd"] == ["x.yaml:6", "x.yaml:2", "x.yaml:4", "x.yaml:5"]
    assert value_of("'<<': 1") == {"<<": 1}


def test_mappings_made_in_python_have_no_lines() -> None:
    document = load_document({"a": 1})
    assert document.fault(("a",), "is bad.") == "<recipe>: a: is bad."


# -- refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml:3: key 'a' is given twice (first on line 1). Keep one of them."),
        ("b:\n  - {c: 1, d: 2,\n     c: 3}", "x.yaml:3: key 'c' is given twice (first on line 2). Keep one of them."),
        ("1: a\n'1': b", "x.yaml:2: key '1' is given twice (first on line 1). Keep one of them."),
        ("a:\n  <<: 3", "x.yaml:2: a merge key (<<) takes a mapping or a list of mappings, such as <<: *anchor."),
        ("a: &x\n  b: 1\n  <<: *x", "x.yaml:3: the mapping merges itself (<<). Name another anchor."),
        ("? [a]\n: b", "x.yaml:1: keys must be plain words; empty and nested keys are not allowed."),
        ("'': b", "x.yaml:1: keys must be plain words; empty and nested keys are not allowed."),
        ("a: 1\n---\nb: 2", "x.yaml: holds 2 YAML documents, one is allowed here."),
        ("a: [1\nb: 2", "x.yaml:2: is not valid YAML: expected ',' or ']', but got ':'."),
        ("a: 1\n\tb: 2", "x.yaml:2: is not valid YAML: found character '\\t' that cannot start any token."),
        ("a: *x", "x.yaml:1: is not valid YAML: found undefined alias 'x'."),
        ("a: !!int abc", "x.yaml:1: 'abc' cannot be read as a value (invalid literal for int() with base 10: 'abc')."),
        ("a: =", "x.yaml:1: the tag !!value is not allowed here. Write plain text, numbers, lists and mappings."),
    ],
)
def test_refusals(text: str, message: str) -> None:
    assert refusal(text) == message


def test_an_unprintable_character() -> None:
    assert refusal("a: \x07").startswith("x.yaml: is not valid YAML: ")


def test_a_number_with_more_digits_than_python_converts() -> None:
    assert refusal("a: 1\nseed: " + "9" * 5000).startswith(f"x.yaml:2: '{'9' * 40}' cannot be read as a value (")


@pytest.mark.parametrize(
    "tagged",
    [
        "!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system x", "!!python/tuple [1]", "!!set {{a, b}}",
        "!!binary aGVsbG8=", "!!omap [a: 1]", "!mine {{a: 1}}", "!mine text",
    ],
)  # fmt: skip
def test_no_tag_makes_an_object(tagged: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    message = refusal(f"a: 1\nb: {tagged.format(canary)}")
    assert message.startswith("x.yaml:2: the tag !")
    assert tagged.split(" ")[0].removeprefix("!!") in message
    assert not canary.exists()


# -- aliases and depth ------------------------------------------------------------------------------------------------------------


def test_an_alias_stands_for_its_anchor() -> None:
    document = parse_document("a: &x {b: 1}\nc: *x\nd: [*x, *x]", "x.yaml")
    assert document.value == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}


def test_an_alias_bomb_is_refused_before_it_fills_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]  # 10^12 values
    assert refusal("\n".join(lines)) == "x.yaml: expands to more than 200,000 values. Write it without nested aliases."


def test_an_alias_in_itself_is_refused() -> None:
    assert refusal("a: &a [*a]") == "x.yaml:1: is nested more than 100 levels deep."
    assert refusal("a: 1\nb: &b\n  c: *b") == "x.yaml:2: is nested more than 100 levels deep."


@pytest.mark.parametrize("depth", [200, 100_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    assert "nested" in refusal("[" * depth + "]" * depth)


# -- files ------------------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: 1")
    with pytest.raises(RecipeError) as caught:
        load_document(tmp_path / "recpie.yaml")
    assert str(caught.value) == (
        f"{tmp_path}/recpie.yaml: cannot be read (No such file or directory). Did you mean 'recipe.yaml'? Give the path of a YAML file."
    )


def test_other_things_that_are_no_text_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read \(Is a directory\)\. Give the path of a YAML file\."):
        load_document(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match=r"cannot be read \(Not a directory\)"):
        load_document(tmp_path / "file" / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file or directory\)\. Give"):
        load_document(tmp_path / "no" / "where.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: 1\n\xff\xfe")
    with pytest.raises(RecipeError, match=r"binary\.yaml: is not UTF-8 text \(invalid start byte at byte 5\)"):
        load_document(binary)


# -- writing ----------------------------------------------------------------------------------------------------------------------

#: without the three line breaks of YAML 1.1 that PyYAML itself does not bring through quotes
plain = st.characters(exclude_categories=("Cs",), exclude_characters="\x85\u2028\u2029")
keys = st.text(plain, min_size=1)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False),
    st.text(plain),
    st.from_regex(r"[-+]?[0-9.]{1,3}[eE][-+]?[0-9]{1,2}", fullmatch=True),
    st.sampled_from(["yes", "on", "null", "~", "12:30", "010", "0x1", "-inf", "nan", "1_0", "2024-01-01", "=", "<<", "1e5\n"]),
)
data = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)), max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(keys, data, max_size=4))
def test_what_is_written_reads_back(value: dict[str, Any]) -> None:
    assert value_of(yaml_text(value) if value else "{}") == value


def test_a_reference_that_looks_like_a_number_is_quoted() -> None:
    assert yaml_text({"model": "1e-5"}) == "model: '1e-5'\n"
    assert yaml_text({"weight": 1e-05}) == "weight: 1.0e-05\n"
