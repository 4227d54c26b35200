"""Configuration trees: strict, errors that name the place, overrides, and text that reads back."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator

from treadle.core.config import (
    Config,
    digest,
    dump,
    from_yaml,
    override,
    parse,
    to_yaml,
)
from treadle.core.errors import ConfigError
from treadle.core.schema import json_schema


class ToyWeave(Config):
    """A shape."""

    @abstractmethod
    def __call__(self) -> int: ...


class ToyPlain(ToyWeave):
    width: int = 4

    def __call__(self) -> int:
        return self.width


class ToyTwill(ToyWeave):
    slope: float
    under: ToyWeave = ToyPlain()

    def __call__(self) -> int:
        return self.under()


class ToyYarn(Config):
    colour: str = "red"
    twist: float | None = None
    ends: tuple[int, ...] = ()


class ToyLoom(Config):
    name: str
    weave: ToyWeave
    yarns: tuple[ToyYarn, ...] = (ToyYarn(),)
    spare: ToyYarn | None = None
    border: ToyWeave | None = None
    shuttles: int = 2
    automatic: bool = False

    @model_validator(mode="after")
    def _fits(self) -> ToyLoom:
        if self.shuttles < 1:
            raise ValueError("shuttles must be at least 1")
        return self


LOOM = ToyLoom(name="first", weave=ToyTwill(slope=0.5), yarns=(ToyYarn(), ToyYarn(colour="blue")))

TEXT = """\
kind: ToyLoom
name: first
weave:
  kind: ToyTwill
  slope: 0.5
yarns:
- colour: blue
- colour: red
  ends: [1, 2]
"""


def read(text: str, *overrides: str) -> ToyLoom:
    return from_yaml(text, expect=ToyLoom, name="loom.yaml", overrides=overrides)


# Trees as hypothesis draws them

words = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "null",
        "true",
        "no",
        "1e5",
        "2024-01-01",
        "0x1f",
        "~",
        "",
        " a ",
        "a: b",
        "# c",
        "*x",
        "&x",
        "\x85",
        "\u2028\ufeff",
        "\r\n",
        "\x00\x7f",
        "a\n\n b",
    ]
)
floats = st.floats(allow_nan=False)
yarns = st.builds(
    ToyYarn,
    colour=words,
    twist=st.none() | floats,
    ends=st.lists(st.integers(), max_size=3).map(tuple),
)
weaves: st.SearchStrategy[ToyWeave] = st.recursive(
    st.builds(ToyPlain, width=st.integers()),
    lambda inner: st.builds(ToyTwill, slope=floats, under=inner),
    max_leaves=3,
)
looms = st.builds(
    ToyLoom,
    name=words,
    weave=weaves,
    yarns=st.lists(yarns, max_size=3).map(tuple),
    spare=st.none() | yarns,
    border=st.none() | weaves,
    shuttles=st.integers(min_value=1),
    automatic=st.booleans(),
)


@given(looms)
def test_yaml_reads_back_as_the_same_tree(loom: ToyLoom) -> None:
    assert read(to_yaml(loom)) == loom


@given(looms)
def test_plain_data_reads_back_as_the_same_tree(loom: ToyLoom) -> None:
    assert parse(dump(loom), expect=ToyLoom) == loom


@given(looms, looms)
def test_digests_differ_exactly_where_trees_differ(a: ToyLoom, b: ToyLoom) -> None:
    assert (digest(a) == digest(b)) == (dump(a) == dump(b))
    assert digest(a) == digest(read(to_yaml(a)))


@given(looms, st.integers(min_value=1))
@settings(max_examples=30)
def test_an_override_changes_one_place_only(loom: ToyLoom, shuttles: int) -> None:
    assert override(loom, [f"shuttles={shuttles}"]) == loom.replace(shuttles=shuttles)


# Strictness


def test_a_tree_is_frozen_and_hashable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LOOM.shuttles = 3  # type: ignore[misc]
    assert len({LOOM, read(to_yaml(LOOM))}) == 1


def test_arguments_are_by_name_only() -> None:
    with pytest.raises(TypeError):
        ToyPlain(3)  # type: ignore[call-arg]


def test_replace_checks_again() -> None:
    with pytest.raises(ValidationError, match="at least 1"):
        LOOM.replace(shuttles=0)
    with pytest.raises(ValidationError, match="not permitted"):
        LOOM.replace(shuttle=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shuttles", "'2'"),
        ("shuttles", "2.0"),
        ("shuttles", "true"),
        ("automatic", "1"),
        ("automatic", "yes"),
        ("name", "3"),
        ("yarns", "blue"),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_line(field: str, value: str) -> None:
    lines = [line for line in TEXT.splitlines() if not line.startswith(f"{field}:")]
    text = "\n".join([*lines, f"{field}: {value}"]) + "\n"
    if field == "yarns":
        text = "\n".join([*TEXT.splitlines()[:5], "yarns: blue"])
    at = text.splitlines().index(f"{field}: {value}") + 1
    with pytest.raises(ConfigError, match=f"^loom.yaml:{at}: {field}: "):
        read(text)


def test_a_shape_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ToyWeave()  # type: ignore[abstract]


def test_whole_numbers_serve_as_floats() -> None:
    weave = read(TEXT, "weave.slope=1").weave
    assert isinstance(weave, ToyTwill)
    assert weave.slope == 1.0
    assert read(TEXT, "weave.slope=5e-6").weave == ToyTwill(slope=5e-6)


# Messages


def message(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_an_unknown_field_names_line_and_nearest() -> None:
    assert (
        message(TEXT.replace("ends:", "end:"))
        == "loom.yaml:9: yarns.1.end: ToyYarn has no field `end`; did you mean `ends`?"
    )


def test_each_wrong_field_has_a_line_of_its_own() -> None:
    found = message(TEXT.replace("ends:", "end:").replace("name: first", "name: 1"))
    assert found.splitlines()[0].startswith("loom.yaml:2: name: ")
    assert found.splitlines()[1].startswith("loom.yaml:9: yarns.1.end: ")


def test_an_unknown_kind_names_line_and_nearest() -> None:
    found = message(TEXT.replace("ToyTwill", "ToyTwil"))
    assert found == "loom.yaml:4: weave: unknown kind `ToyTwil`; did you mean `ToyTwill`?"


def test_a_shape_without_kind_lists_the_choices() -> None:
    found = message(TEXT.replace("  kind: ToyTwill\n", ""))
    assert found.startswith("loom.yaml:3: weave: name one with `kind:`, one of ")
    assert "ToyPlain, ToyTwill" in found


def test_a_class_of_another_shape_is_refused() -> None:
    found = message(TEXT, "weave={kind: ToyYarn}")
    assert found.startswith("override `weave={kind: ToyYarn}`: weave: ToyYarn is no ToyWeave; name")


def test_a_missing_field_is_named() -> None:
    assert message(TEXT.replace("  slope: 0.5\n", "")) == "loom.yaml:3: weave.slope: Field required"


def test_what_a_class_itself_refuses_is_named() -> None:
    assert message(TEXT, "shuttles=0").endswith("shuttles must be at least 1")


def test_another_class_at_the_top_is_refused() -> None:
    assert "this is a ToyYarn, but a ToyLoom is needed here" in message("kind: ToyYarn\n")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: [1", "not valid YAML"),
        ("kind: ToyLoom\nkind: ToyLoom", "not valid YAML"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("&a\nkind: ToyLoom\nweave: *a", "refers to what it is part of"),
    ],
)
def test_text_that_is_no_tree_is_refused(text: str, found: str) -> None:
    assert message(text).startswith("loom.yaml: ")
    assert found in message(text)


def test_a_file_cannot_name_foreign_code() -> None:
    for kind in ("os.system", "Path", "str", "treadle.core.config.Config"):
        assert f"unknown kind `{kind}`" in message(f"kind: {kind}\n")


# Overrides


def test_overrides_reach_every_depth() -> None:
    loom = read(TEXT, "weave.under.width=9", "yarns.1.ends=[3]", "spare={colour: green}")
    assert loom.weave == ToyTwill(slope=0.5, under=ToyPlain(width=9))
    assert loom.yarns == (ToyYarn(colour="blue"), ToyYarn(ends=(3,)))
    assert loom.spare == ToyYarn(colour="green")


class ToyMill(Config):
    looms: tuple[ToyLoom, ...]


def test_overrides_find_entries_by_name() -> None:
    mill = ToyMill(looms=(LOOM, LOOM.replace(name="second"), LOOM.replace(name="3")))
    changed = override(mill, ["looms.second.shuttles=9", "looms.2.shuttles=7"])
    assert [loom.shuttles for loom in changed.looms] == [2, 9, 7]
    with pytest.raises(ConfigError, match=r"no `secnd`; did you mean `second`\?"):
        override(mill, ["looms.secnd.shuttles=9"])
    with pytest.raises(ConfigError, match=r"^override `looms.second.shuttles=x`: looms\.1\.shu"):
        override(mill, ["looms.second.shuttles=x"])


def test_overrides_apply_in_order() -> None:
    loom = read(TEXT, "spare={colour: green}", "spare.twist=2.0", "shuttles=3", "shuttles=4")
    assert (loom.spare, loom.shuttles) == (ToyYarn(colour="green", twist=2.0), 4)


def test_an_override_changes_the_kind() -> None:
    loom = read(TEXT, "weave={kind: ToyPlain, width: 3}")
    assert loom.weave == ToyPlain(width=3)
    assert read(TEXT, "weave.under.kind=ToyPlain").weave == ToyTwill(slope=0.5)


def test_an_override_leaves_equal_subtrees_alone() -> None:
    twill = ToyTwill(slope=0.25, under=ToyTwill(slope=2.0, under=ToyTwill(slope=4.0)))
    loom = ToyLoom(name="twice", weave=twill, border=twill)
    assert "*" in to_yaml(loom)
    changed = override(loom, ["weave.under.slope=3.0"])
    assert changed.weave == twill.replace(under=twill.under.replace(slope=3.0))
    assert changed.border == twill


@pytest.mark.parametrize(
    ("item", "found"),
    [
        ("shuttles", "write it as path=value"),
        ("shuttle=3", "ToyLoom has no field `shuttle`; did you mean `shuttles`?"),
        ("weave.under.widht=3", "ToyPlain has no field `widht`; did you mean `width`?"),
        ("yarns.7.twist=1", "`yarns` has 2 entries, no `7`"),
        ("yarns.first.twist=1", "`yarns` has 2 entries, no `first`"),
        ("name.x=1", "`name` is a value, it has no `x`"),
        ("spare.twist=1", "`spare` is not set: give it whole, as {kind: ..., twist: ...}"),
        ("shuttles=[1", "`[1` is not valid YAML"),
        ("shuttles=many", "shuttles: Input should be a valid integer"),
        ("weave.kind=ToyPlian", "unknown kind `ToyPlian`; did you mean `ToyPlain`?"),
        ("=3", "ToyLoom has no field ``"),
        ("weave.kind.x=3", "ToyTwill has no field `kind`"),
    ],
)
def test_a_wrong_override_names_itself(item: str, found: str) -> None:
    assert message(TEXT, item).startswith(f"override `{item}`: ")
    assert found in message(TEXT, item)


# Schema


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found = json_schema(ToyLoom)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def valid(schema: dict[str, Any], data: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(data))


@given(looms)
@settings(max_examples=30, deadline=None)
def test_schema_takes_every_tree(schema: dict[str, Any], loom: ToyLoom) -> None:
    assert valid(schema, dump(loom))


def test_schema_refuses_what_the_parser_refuses(schema: dict[str, Any]) -> None:
    good = dump(LOOM)
    assert valid(schema, good)
    assert not valid(schema, {**good, "shuttle": 1})
    assert not valid(schema, {**good, "shuttles": "2"})
    assert not valid(schema, {**good, "weave": {"width": 3}})
    assert not valid(schema, {**good, "weave": dump(ToyYarn())})
    assert not valid(schema, {**good, "kind": "ToyYarn"})


def test_schema_shows_defaults_with_their_kind(schema: dict[str, Any]) -> None:
    under = schema["$defs"]["ToyTwill"]["properties"]["under"]
    assert under["default"] == {"kind": "ToyPlain", "width": 4}


def test_every_class_of_the_package_has_a_name_of_its_own(schema: dict[str, Any]) -> None:
    kinds = [
        d["properties"]["kind"]["const"] for d in schema["$defs"].values() if "properties" in d
    ]
    repeated = {a for a, b in itertools.pairwise(sorted(kinds)) if a == b}
    assert not {k for k in repeated if not k.startswith("Toy")}
