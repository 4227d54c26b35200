"""llama.cpp's own quantiser, from the shared library that llama-cpp-python brings."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor


def ggml_quantise(x: Tensor, ggml_type: int, block_size: int, block_bytes: int) -> Tensor:
    """Rows of float32 weights to rows of bytes; skips the test where llama.cpp is absent."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    quantise = ggml.ggml_quantize_chunk
    quantise.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    quantise.restype = ctypes.c_size_t
    rows, columns = x.shape
    x = x.contiguous()
    out = torch.zeros(rows, columns // block_size * block_bytes, dtype=torch.uint8)
    written = quantise(ggml_type, x.data_ptr(), out.data_ptr(), 0, rows, columns, None)
    assert written == out.numel()
    return out
