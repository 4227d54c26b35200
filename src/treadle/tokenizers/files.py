"""Tokenizer folders as transformers lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from treadle.core.errors import FileFormatError
from treadle.core.files import write_json, write_text
from treadle.tokenizers.tokenizer import SpecialTokens, Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a folder or a `tokenizer.json` and the files beside it.

    `tokenizer_config.json` (older: `special_tokens_map.json`) names the special tokens,
    `generation_config.json` further stop ids, `chat_template.jinja` the template.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileFormatError(
            f"{file}: no such file; a tokenizer needs a `tokenizer.json` "
            "(transformers writes one with save_pretrained)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise FileFormatError(f"{file}: not a tokenizer.json: {error}") from None
    folder = file.parent
    config = {
        **_json(folder / "special_tokens_map.json"),
        **_json(folder / "tokenizer_config.json"),
    }
    roles = {role: _spelled(config.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")}
    known = {r: t if t and backend.token_to_id(t) is not None else None for r, t in roles.items()}
    ends = _json(folder / "generation_config.json").get("eos_token_id") or []
    stops = [backend.id_to_token(i) for i in (ends if isinstance(ends, list) else [ends])]
    special = SpecialTokens(
        **known, stops=tuple(t for t in (*config.get("stop_tokens", ()), *stops) if t)
    )
    return Tokenizer(backend, special=special, chat_template=_template(folder, config))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    special = tokenizer.special
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": special.bos,
        "eos_token": special.eos,
        "pad_token": special.pad,
        "unk_token": special.unk,
    }
    config = {key: value for key, value in config.items() if value is not None}
    if special.stops:
        config["stop_tokens"] = list(special.stops)
    if tokenizer.chat_template is not None:
        # Newer readers take the .jinja file, older ones the key.
        config["chat_template"] = tokenizer.chat_template
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)
    write_text(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", config)


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # named templates: the one called default
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _spelled(token: Any) -> str | None:
    """A token is a string, or an object with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{file}: expected an object, found {type(content).__name__}")
    return content
