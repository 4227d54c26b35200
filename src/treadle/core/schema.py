"""JSON Schema of a configuration tree, so that editors complete and check YAML while one types."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from pydantic.json_schema import models_json_schema

from treadle.core import registry
from treadle.core.config import Config, dump

NOTHING: list[dict[str, Any]] = [{"not": {}}]
"""What a shape without any class takes."""


def json_schema(root: type[Config]) -> dict[str, Any]:
    """The schema of a tree below `root` (a shape or a class), with every known `kind`.

    Imports the whole package, since each technique declares its own fields.
    """
    index = registry.class_index()
    for kind in registry.kinds_of(Config):
        for module in index.get(kind, ()):
            importlib.import_module(module)
    known = sorted({root, *registry.subclasses(Config)}, key=lambda c: (c.__name__, c.__module__))
    classes = [c for c in known if not inspect.isabstract(c)]
    names, schema = models_json_schema([(c, "validation") for c in known])
    definitions = schema["$defs"]
    refs = {c: names[c, "validation"]["$ref"] for c in known}
    for cls in known:
        name = refs[cls].rpartition("/")[2]
        if inspect.isabstract(cls):
            below = [_named(refs[c]) for c in classes if issubclass(c, cls)]
            definitions[name] = {"anyOf": below or NOTHING}
            continue
        properties = definitions[name].setdefault("properties", {})
        for field, info in cls.model_fields.items():
            if not info.is_required():
                properties[field]["default"] = dump(info.get_default(call_default_factory=True))
        definitions[name]["properties"] = {"kind": {"const": cls.__name__}, **properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "anyOf": [_named(refs[c]) for c in classes if issubclass(c, root)],
        "$defs": definitions,
    }


def _named(ref: str) -> dict[str, Any]:
    """Where several classes fit, YAML has to say which."""
    return {"$ref": ref, "required": ["kind"]}
