"""What an engine may use: slots, pages, queue, disk."""

from __future__ import annotations

from pydantic import Field

from treadle.core.config import Config
from treadle.inference.cache import Cache
from treadle.inference.decode import Decode, Eager
from treadle.inference.speculative import Draft


class EngineConfig(Config):
    """Limits of the engine."""

    slots: int = Field(64, ge=1)
    """Sequences that run at once."""
    prefill_tokens: int = Field(4096, ge=1)
    """Prompt tokens computed in one pass; longer prompts are computed in chunks."""
    cache_tokens: int | None = Field(None, ge=1)
    """Tokens whose keys and values are kept; None: what the slots can need, but at most a quarter
    of the machine's memory."""
    cache: Cache | None = None
    """How they are kept, where plain torch runs the model; None: Paged, Contiguous behind a
    learned prefix, or what `decode` needs."""
    decode: Decode = Eager()
    """How plain torch runs passes in which every sequence writes a token."""
    queue: int | None = Field(None, ge=1)
    """Requests that may wait; None: any number."""
    adapters: int = Field(8, ge=1)
    """Adapters in memory at once; others that requests may name wait in their folders."""
    draft: Draft | None = None
    """Guesses tokens ahead: speculative decoding; None: one token a pass."""
    prefix_folder: str | None = None
    """Where pages of prompts are kept for later processes; None: nowhere."""
    prefix_gigabytes: float = Field(2.0, gt=0.0)
    """Most that one model's pages may take there."""
