"""treadle: the whole craft of small language models in one codebase."""

__version__ = "0.1.0"
