"""The configuration tree: frozen, strict, typed values that can be shown, edited and run again.

Every component is configured by a `Config` that lives beside it. A run is one tree of them.
`dump` turns a tree into plain data (each node names its `kind`), `to_yaml` into text;
`parse` and `from_yaml` turn it back, with the line and the nearest valid name in each error.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from copy import copy
from io import StringIO
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from treadle.core import registry
from treadle.core.errors import ConfigError, did_you_mean

_LINE_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")

WORTH_SHARING = 160
"""Characters from which a repeated subtree is written once; smaller ones read better in place."""

Path = tuple[str | int, ...]
C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen, keyword-only, strict configuration; an unknown key is an error.

    A class with abstract methods is a *shape* (Objective, Transform, ...). A field typed with a
    shape accepts any class below it, and in YAML names it with `kind`.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _shape_needs_kind(cls, data: Any) -> Any:
        if inspect.isabstract(cls) and not isinstance(data, cls):
            choices = ", ".join(registry.kinds_of(cls))
            found = f"{type(data).__name__} is no {cls.__name__}; " if _is_config(data) else ""
            raise ValueError(f"{found}name one with `kind:`, one of {choices}")
        return data

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **changes})


def _is_config(value: Any) -> bool:
    return isinstance(value, Config)


def dump(value: Any) -> Any:
    """Plain data (dict, list, scalar) that `parse` turns back into an equal tree."""
    if isinstance(value, Config):
        fields = {name: dump(getattr(value, name)) for name in type(value).model_fields}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [dump(v) for v in value]
    if isinstance(value, Mapping):
        return {k: dump(v) for k, v in value.items()}
    return value


def digest(value: Any) -> str:
    """A hash that is equal exactly for equal trees (16 hexadecimal digits)."""
    text = json.dumps(dump(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Representer(RoundTripRepresenter):
    """Writes `null` where ruamel writes nothing."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_Representer.add_representer(type(None), _Representer.represent_none)


def to_yaml(config: Config) -> str:
    """YAML text; equal subtrees (the blocks of a decoder) are written once and referred to."""
    seen: dict[str, Any] = {}

    def share(node: Any) -> Any:
        if isinstance(node, dict):
            node = {k: share(v) for k, v in node.items()}
            text = json.dumps(node, sort_keys=True)
            return seen.setdefault(text, node) if len(text) >= WORTH_SHARING else node
        if isinstance(node, str) and _LINE_BREAKS.search(node):
            return DoubleQuotedScalarString(node)  # ruamel escapes them in this style only
        if not isinstance(node, list):
            return node
        entries = CommentedSeq([share(v) for v in node])
        if not any(isinstance(v, dict | list) for v in node):
            entries.fa.set_flow_style()
        return entries

    yaml, out = YAML(), StringIO()
    yaml.width = 100
    yaml.Representer = _Representer
    yaml.dump(share(dump(config)), out)
    return out.getvalue()


def from_yaml(
    text: str, *, expect: type[C], name: str = "config", overrides: typing.Sequence[str] = ()
) -> C:
    """Read a tree from YAML text and apply dotted overrides such as ``fit.steps=20``.

    Raises:
        ConfigError: with `name:line` of each offending key and the nearest valid one.
    """
    yaml = YAML(typ="rt", pure=True)
    try:
        data = yaml.load(text)
    except YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: expected a mapping with `kind:`, found {type(data).__name__}")
    changed = [_override(data, item, expect) for item in overrides]

    def where(path: Path) -> str:
        for target, item in reversed(list(zip(changed, overrides, strict=True))):
            if path[: len(target)] == target:
                return f"override `{item}`"
        return f"{name}:{_line(data, path)}"

    try:
        return parse(data, expect=expect, where=where)
    except RecursionError:
        raise ConfigError(f"{name}: an alias (`*name`) refers to what it is part of") from None


def override(config: C, overrides: typing.Sequence[str]) -> C:
    """`config` with dotted overrides applied, checked like any other configuration."""
    if not overrides:
        return config
    text = to_yaml(config)
    return from_yaml(text, expect=type(config), name=type(config).__name__, overrides=overrides)


def parse(data: Any, *, expect: type[C], where: Callable[[Path], str] = lambda path: "config") -> C:
    """Build the tree that `data` describes; `where(path)` names a place in messages."""
    built = _parse(data, (), where)
    if isinstance(built, Mapping):
        built = _validate(expect, built, (), where)
    if not isinstance(built, expect):
        raise ConfigError(
            f"{where(())}: this is a {type(built).__name__}, but a {expect.__name__} is needed here"
        )
    return built


def _parse(node: Any, path: Path, where: Callable[[Path], str]) -> Any:
    if isinstance(node, Mapping):
        children = {
            str(k): _parse(v, (*path, str(k)), where) for k, v in node.items() if k != "kind"
        }
        if "kind" not in node:
            return children
        try:
            cls = registry.resolve(str(node["kind"]), Config)
        except ConfigError as error:
            raise ConfigError(f"{where((*path, 'kind'))}: {_dotted(path)}: {error}") from None
        return _validate(cls, children, path, where)
    if isinstance(node, list | tuple):
        return tuple(_parse(v, (*path, i), where) for i, v in enumerate(node))
    return _plain(node)


def _plain(scalar: Any) -> Any:
    """ruamel keeps the layout of scalars in subclasses; strict validation wants the plain types."""
    for plain in (bool, int, float, str):
        if isinstance(scalar, plain):
            return plain(scalar)
    return scalar


def _validate(
    cls: type[Any], fields: Mapping[str, Any], path: Path, where: Callable[[Path], str]
) -> Any:
    try:
        return cls.model_validate(dict(fields))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            place = (*path, *item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                owner = _owner(cls, item["loc"][:-1])
                hint = did_you_mean(str(item["loc"][-1]), owner.model_fields)
                message = f"{owner.__name__} has no field `{item['loc'][-1]}`{hint}"
            lines.append(f"{where(place)}: {_dotted(place)}: {message}")
        raise ConfigError("\n".join(lines)) from None


def _owner(cls: type[Config], loc: Path) -> type[Config]:
    for key in loc:
        field = cls.model_fields.get(str(key))
        nested = _config_in(field.annotation) if field else None
        cls = nested or cls
    return cls


def _config_in(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(
        annotation
    ):
        return next((c for c in map(_config_in, typing.get_args(annotation)) if c), None)
    return None


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "(top)"


def _line(document: Any, path: Path) -> int:
    """1-based line of the deepest part of `path` that is in the document."""
    line, data = 1, document
    for key in path:
        try:
            position = data.lc.key(key) if isinstance(key, str) else data.lc.item(key)
            line, data = position[0] + 1, data[key]
        except (KeyError, IndexError, AttributeError, TypeError):
            break
    return line


def _override(data: Any, item: str, expect: type[Config]) -> Path:
    """Apply ``a.b.0=value`` in place and return the path it changed.

    An entry of a list is found by its index, or by its `name` where it has one.
    """
    dotted, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"override `{item}`: write it as path=value, for instance fit.steps=20")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise ConfigError(f"override `{item}`: `{text}` is not valid YAML; quote it") from None
    path = [int(p) if p.isdecimal() else p for p in dotted.split(".")]
    node, cls = data, expect
    for depth, key in enumerate(path):
        here = f"override `{item}`: `{_dotted(tuple(path[:depth]))}`"
        last = depth == len(path) - 1
        if isinstance(node, MutableMapping):
            cls = _class_of(node, cls)
            if key not in cls.model_fields and (key, last) != ("kind", True):
                hint = did_you_mean(str(key), cls.model_fields)
                raise ConfigError(f"override `{item}`: {cls.__name__} has no field `{key}`{hint}")
            if not last:
                field = cls.model_fields[str(key)]
                cls = _config_in(field.annotation) or cls
                node.setdefault(key, _default(field))
        elif isinstance(node, list):
            names = [_name_of(entry, cls) for entry in node]
            if key in names:
                path[depth] = key = names.index(str(key))
            if not isinstance(key, int) or key >= len(node):
                hint = did_you_mean(str(key), filter(None, names))
                raise ConfigError(f"{here} has {len(node)} entries, no `{key}`{hint}")
        elif node is None:
            raise ConfigError(f"{here} is not set: give it whole, as {{kind: ..., {key}: ...}}")
        else:
            raise ConfigError(f"{here} is a value, it has no `{key}`")
        # Equal subtrees are shared by YAML aliases: change this place only.
        node[key] = value if last else copy(node[key])
        node = node[key]
    return tuple(path)


def _name_of(entry: Any, declared: type[Config]) -> str:
    """The `name` of an entry of a list, by which overrides find it; empty where it has none."""
    if not isinstance(entry, Mapping):
        return ""
    field = _class_of(entry, declared).model_fields.get("name")
    return str(entry.get("name", _default(field) or "")) if field else ""


def _default(field: FieldInfo) -> Any:
    """Plain data of a field's default, or None where it has to be given."""
    return None if field.is_required() else dump(field.get_default(call_default_factory=True))


def _class_of(node: Mapping[str, Any], declared: type[Config]) -> type[Config]:
    """The class that a mapping describes; a wrong `kind` is left to `parse`, which knows lines."""
    with suppress(ConfigError):
        if "kind" in node:
            return registry.resolve(str(node["kind"]), Config)
    return declared
