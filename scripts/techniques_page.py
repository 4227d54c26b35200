#!/usr/bin/env python3
"""Writes `docs/techniques.md` from the cards in the source.

    python3 scripts/techniques_page.py           write the page
    python3 scripts/techniques_page.py --check   fail where the page is not what would be written

Needs no installed package: cards are read from source text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "techniques.md"
SECTIONS = {
    "data": "Data",
    "tok": "Tokenizers",
    "arch": "Architecture",
    "model": "Model families",
    "pre": "Pretraining",
    "opt": "Optimisation",
    "par": "Parallelism",
    "ft": "Fine-tuning",
    "al": "Alignment",
    "kd": "Distillation",
    "re": "Reasoning",
    "inf": "Inference",
    "q": "Quantisation",
    "prune": "Pruning",
    "deploy": "Deployment",
    "rag": "Retrieval",
    "safe": "Safety",
    "ev": "Evaluation",
    "mm": "Vision, audio, several modalities",
    "diff": "Diffusion",
    "plan": "Planning",
    "app": "Applications",
}
HEAD = """\
# Techniques

{done} of {all} work. This page is written by `scripts/techniques_page.py` from the cards in the
source; `treadle techniques` shows the same in a terminal. Each row is held to an independent
reference by the test named last.
"""


def main(arguments: Sequence[str]) -> int:
    sys.path.insert(0, str(ROOT / "src"))
    text = page()
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/techniques.md is not current: run `python3 scripts/dev.py fix`")
    return 1


def page() -> str:
    """The whole page."""
    from treadle.core.cards import catalogue_ids, read_cards

    cards = {card.id: card for card in read_cards()}
    ids = catalogue_ids()
    parts = [HEAD.format(done=sum(i in cards for i in ids), all=len(ids))]
    for prefix, group in groupby(ids, key=lambda i: i.partition(".")[0]):
        names = list(group)
        found = [
            card
            for name in names
            for card in cards.values()
            if card.id == name or card.id.rpartition(".")[0] == name
        ]
        planned = [f"`{name}`" for name in names if name not in cards]
        parts.append(f"\n## {SECTIONS[prefix]}\n")
        for card in found:
            file = card.code.partition(":")[0]
            test, _, function = card.oracle.partition("::")
            parts.append(
                f"\n**`{card.id}`** {card.summary}  \n"
                f"{card.paper}  \n"
                f"[{file}](../src/{file}) · `{card.recipe}` · "
                f"[{function}](../{test})\n"
            )
        if planned:
            parts.append(f"\nPlanned: {', '.join(planned)}\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
