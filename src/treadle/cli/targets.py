"""From what a user types (a recipe, a file, the folder of a run) to a pipeline.

A recipe is a function in `treadle/recipes/<name>.py` called as its file; it is found by the name
of the file, so that listing recipes imports none of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treadle.core.errors import ConfigError, TreadleError, did_you_mean

if TYPE_CHECKING:
    from treadle.core.config import Config
    from treadle.core.pipeline import Pipeline

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
MODELS = RECIPES.parent / "models"


def recipe_files() -> dict[str, Path]:
    """Recipe name -> its file; `quickstart_scratch.py` is `quickstart-scratch`."""
    return {
        path.stem.replace("_", "-"): path
        for path in sorted(RECIPES.glob("*.py"))
        if _recipe_function(path) is not None
    }


def summary(path: Path) -> str:
    """The first line of a recipe's docstring, or of its file's, without importing it."""
    function = _recipe_function(path)
    text = ast.get_docstring(function) if function else None
    text = text or ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return text.split("\n")[0] if text else ""


def load(target: str, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline that `target` names, with overrides applied.

    A single step stands for a pipeline of that step.

    Raises:
        TreadleError: no such recipe or file; names what is near.
        ConfigError: the file or an override does not fit.
    """
    from treadle.core.config import Config, from_yaml, override
    from treadle.core.pipeline import Pipeline, Step

    path = Path(target)
    if path.is_dir():
        path = path / "pipeline.yaml"
    if path.suffix in (".yaml", ".yml"):
        text = _read(path)
        tree = from_yaml(text, expect=Config, name=target, overrides=overrides)
    else:
        tree = override(_recipe(target), overrides)
    if isinstance(tree, Step):
        return Pipeline(name=_name(path.stem), steps=(tree,))
    if not isinstance(tree, Pipeline):
        raise ConfigError(f"{target} is a {type(tree).__name__}; what runs is a Pipeline or a step")
    return tree


def presets() -> dict[str, str]:
    """Name of a model family's preset, such as `gpt2` -> the module that has it."""
    found = {}
    for path in sorted(MODELS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and _returns_decoder(node):
                found[node.name.replace("_", "-")] = f"treadle.models.{path.stem}"
    return found


def _returns_decoder(node: ast.FunctionDef) -> bool:
    given = node.args
    needed = (
        len(given.posonlyargs + given.args) - len(given.defaults) + given.kw_defaults.count(None)
    )
    returned = node.returns
    public = not node.name.startswith("_")
    return public and not needed and isinstance(returned, ast.Name) and returned.id == "Decoder"


def load_any(target: str, overrides: Sequence[str] = ()) -> Config:
    """What `load` gives, or the decoder of a model family's preset.

    Raises:
        TreadleError: there is neither; names what is near.
    """
    from treadle.core.config import override

    name, known, recipes = target.replace("_", "-"), presets(), recipe_files()
    if name in recipes or Path(target).suffix or Path(target).is_dir():
        return load(target, overrides)
    if name not in known:
        hint = did_you_mean(name, [*recipes, *known])
        raise TreadleError(f"no recipe or preset `{target}`{hint}")
    module = importlib.import_module(known[name])
    preset: Config = getattr(module, name.replace("-", "_"))()
    return override(preset, overrides)


def _recipe(target: str) -> Any:
    if target.endswith(".py"):
        path = Path(target)
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise TreadleError(f"{target}: no such file")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, path.stem):
            raise TreadleError(f"{target}: define a function `{path.stem}()` that returns the run")
        return getattr(module, path.stem)()
    files = recipe_files()
    name = target.replace("_", "-")
    if name not in files:
        hint = did_you_mean(name, files)
        raise TreadleError(
            f"no recipe `{target}`{hint}\n"
            "`treadle recipes` lists them; a file of your own ends in .yaml or .py"
        )
    stem = files[name].stem
    return getattr(importlib.import_module(f"treadle.recipes.{stem}"), stem)()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise TreadleError(f"{path}: no such file{did_you_mean(path.name, beside)}") from None
    except UnicodeDecodeError:
        raise TreadleError(f"{path} is not text; a configuration is YAML in UTF-8") from None


def _recipe_function(path: Path) -> ast.FunctionDef | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == path.stem:
            return node
    return None


def _name(stem: str) -> str:
    return stem.replace("_", "-")
