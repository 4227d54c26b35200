"""Made-up conversations, and an environment with a tiny tokenizer and model to read them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from treadle.core.pipeline import Workspace
from treadle.data.records import Chat, assistant, user
from treadle.data.source import Env
from treadle.data.supervised import Conversations
from treadle.models.llama import tiny_llama
from treadle.models.source import ModelSource, Opened
from treadle.tokenizers.tokenizer import Tokenizer
from treadle.tokenizers.train import ByteLevelBPE

TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor -%}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Numbered(Conversations):
    """`word i` and an answer whose length goes up and down with i."""

    word: str
    amount: int = 20
    endless: bool = False

    def conversation(self, index: int) -> Chat:
        length = 1 + (7 * index) % self.amount
        return Chat((user(f"{self.word} {index}"), assistant(self.word[0] * length)))

    def count(self) -> int | None:
        return None if self.endless else self.amount


@lru_cache(maxsize=1)
def chat_tokenizer() -> Tokenizer:
    words = "user assistant system weave warp weft reed heddle shuttle loom 0123456789"
    return ByteLevelBPE(vocab_size=300)([words] * 4).with_template(TEMPLATE)


def chat_env(scratch: Path, *, seed: int = 1, dim: int = 16) -> Env:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    decoder = tiny_llama(tokenizer.vocab_size, dim=dim, layers=2, heads=2, kv_heads=1, hidden=24)
    return Env(model=decoder.build(), tokenizer=tokenizer, scratch=scratch, seed=seed)


class ChatModel(ModelSource):
    """The model of `chat_env`, with its tokenizer in a folder."""

    folder: str

    def open(self, workspace: Workspace) -> Opened:
        chat_tokenizer().save(self.folder)
        return Opened(chat_env(Path(self.folder)).model, Path(self.folder))
