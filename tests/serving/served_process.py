"""`treadle serve` as a process of its own, for tests that kill it or weigh it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI
from tiny_generation import byte_tokenizer

from treadle.models.hub.save import save_hf
from treadle.models.llama import tiny_llama
from treadle.tokenizers.template import CHATML


def write_model(folder: Path) -> Path:
    model = tiny_llama(257, dim=64, layers=2, kv_heads=2, hidden=96, context=1024).build()
    save_hf(model, folder)
    byte_tokenizer().with_template(CHATML).save(folder)
    return folder


class Process:
    """A server that has said where it listens."""

    def __init__(self, child: subprocess.Popen[str], url: str) -> None:
        self.child, self.url = child, url

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def served(*arguments: str | Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "treadle", "serve", "--port", "0", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": "src", "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        found = re.match(r"http://\S+", line)
        assert found, f"the server did not start: {line}"
        yield Process(child, found[0])
    finally:
        child.kill()
        child.wait()
