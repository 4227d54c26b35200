"""What a server may use, and how long it waits."""

from __future__ import annotations

from pydantic import Field

from treadle.core.config import Config


class Limits(Config):
    """Bounds that keep one client from harming the others."""

    body_bytes: int = Field(4 * 2**20, ge=1)
    """Longest request body; a longer one is answered with 413."""
    requests: int = Field(256, ge=1)
    """Requests that a model has in hand, waiting ones too; more are answered with 429."""
    completions: int = Field(16, ge=1)
    """Largest `n`."""
    inputs: int = Field(256, ge=1)
    """Texts in one embedding request, prompts in one completion request."""
    remembered: int = Field(32 * 2**20, ge=0)
    """Characters of conversations that `/v1/responses` can go on with."""
    seconds: float = Field(600.0, gt=0.0)
    """From a request to the end of its answer, waiting included."""
    stall_seconds: float = Field(30.0, gt=0.0)
    """A client that reads nothing for so long loses its stream."""


class Serve(Config):
    """How to serve."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    keys: tuple[str, ...] = ()
    """API keys; without any, everybody may ask."""
    limits: Limits = Limits()
    idle_seconds: float = Field(900.0, gt=0.0)
    """A model that nobody uses for so long is unloaded."""
    memory_bytes: int | None = Field(None, ge=1)
    """Weights that may be loaded at once; the least recently used model makes room."""
    drain_seconds: float = Field(30.0, ge=0.0)
    """After SIGTERM, how long requests under way may take to finish."""
