#!/usr/bin/env python3
"""Builds the documentation as a site: the pages of `docs/`, and one page a technique from its card.

    python3 scripts/dev.py docs          the environment, then the site in build/site
    python3 scripts/docs_site.py --pages write the pages only, in build/docs

A technique's page has what its card says, the fields of its configuration, and its source, which
is written to be read; none of it is kept by hand.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

from techniques_page import ROOT, SECTIONS

from treadle.core.cards import Card, catalogue_ids, read_cards
from treadle.core.config import Config, dump

PAGES, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
GUIDES = {
    "Guides": ("choose.md", "alignment.md", "configuration.md", "serving.md", "caches.md"),
    "Tutorials": ("tutorials/support.md", "tutorials/half-size.md"),
    "Why": ("design.md", "log.md", "CONTRIBUTING.md"),
}
OUTSIDE = re.compile(r"\[([^]]+)]\((?:\.\./)+[^)]*\)")
"""A link to a file of the repository that is no page of the site."""


def main(arguments: Sequence[str]) -> int:
    write_pages()
    if "--pages" in arguments:
        return 0
    settings = str(PAGES.parent / "site.toml")
    done = subprocess.call(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", settings]
    )
    if not done:
        print(f"the site is in {SITE.relative_to(ROOT)}: open index.html")
    return done


def write_pages() -> None:
    """All pages and the configuration of the site, anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    shutil.copy(ROOT / "README.md", PAGES / "index.md")
    shutil.copy(ROOT / "CONTRIBUTING.md", PAGES)
    for page in PAGES.rglob("*.md"):
        text = page.read_text(encoding="utf-8").replace("](docs/", "](")
        page.write_text(OUTSIDE.sub(r"\1", text), encoding="utf-8", newline="\n")
    cards = read_cards()
    folder = PAGES / "techniques"
    folder.mkdir()
    for card in cards:
        (folder / f"{card.id}.md").write_text(technique(card), encoding="utf-8", newline="\n")
    (PAGES / "techniques.md").write_text(index(cards), encoding="utf-8", newline="\n")
    (PAGES.parent / "site.toml").write_text(site(), encoding="utf-8", newline="\n")


def technique(card: Card) -> str:
    """The page of one technique."""
    file = card.code.partition(":")[0]
    test = card.oracle.partition("::")[0]
    parts = [
        f"# {card.id}\n\n{card.summary}\n\n",
        f"- From: {card.paper}\n- Try it: `{card.recipe}`\n- Code: `src/{file}`\n"
        f"- Proof: `{card.oracle}`\n",
    ]
    classes = list(configs(file))
    if classes:
        parts.append("\n## Configuration\n")
    parts += [fields(cls) for cls in classes]
    for title, path in (("The code", ROOT / "src" / file), ("Its proof", ROOT / test)):
        source = path.read_text(encoding="utf-8").rstrip()
        parts.append(f"\n## {title}\n\n````python\n{source}\n````\n")
    return "".join(parts)


def configs(file: str) -> Iterator[type[Config]]:
    """The public configurations that a file declares, in its order."""
    name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for cls in vars(importlib.import_module(name)).values():
        ours = inspect.isclass(cls) and issubclass(cls, Config) and cls.__module__ == name
        if ours and not cls.__name__.startswith("_"):
            yield cls


def fields(cls: type[Config]) -> str:
    """What a configuration is and the table of its fields."""
    said = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    shape = " A shape: one of its kinds is named." if inspect.isabstract(cls) else ""
    rows = []
    types = {
        k: v for base in reversed(cls.__mro__) for k, v in inspect.get_annotations(base).items()
    }
    for name, info in cls.model_fields.items():
        default = "required"
        if not info.is_required():
            default = f"`{dump(info.get_default(call_default_factory=True))}`"
        kind = str(types[name]).replace("|", "\\|")
        meaning = " ".join((info.description or "").split())
        rows.append(f"| `{name}` | `{kind}` | {cell(default)} | {cell(meaning)} |\n")
    table = "\n| field | type | default | meaning |\n|---|---|---|---|\n" + "".join(rows)
    return f"\n### {cls.__name__}\n\n{said}{shape}\n{table if rows else ''}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def index(cards: Sequence[Card]) -> str:
    """All techniques, a line each, and what is planned."""
    have = {card.id for card in cards}
    parts = [f"# Techniques\n\n{len(have)} pages, each from the card, the code and the test.\n"]
    for prefix, group in groupby(catalogue_ids(), key=lambda i: i.partition(".")[0]):
        parts.append(f"\n## {SECTIONS[prefix]}\n\n")
        parts += [
            f"- [`{card.id}`](techniques/{card.id}.md) {card.summary}\n"
            for card in cards
            if card.id.partition(".")[0] == prefix
        ]
        planned = [f"`{name}`" for name in group if name not in have]
        parts.append(f"\nPlanned: {', '.join(planned)}\n" if planned else "")
    return "".join(parts)


def site() -> str:
    """The generator's settings."""
    guides = "".join(
        f"  {{ {title!r} = [{', '.join(repr(page) for page in pages)}] }},\n"
        for title, pages in GUIDES.items()
    ).replace("'", '"')
    return (
        '[project]\nsite_name = "treadle"\n'
        'site_description = "The whole craft of small language models."\n'
        'docs_dir = "docs"\nsite_dir = "site"\nuse_directory_urls = false\n'
        f'nav = [\n  "index.md",\n{guides}  "techniques.md",\n]\n'
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
