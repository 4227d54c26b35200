"""Recording a pass once, and running it again without its operators being launched one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from treadle.core.errors import TreadleError
from treadle.inference.advance import Ready

WARM = 3
"""Runs before the recording: libraries choose their algorithms and take their workspaces."""


class Recorder(ABC):
    """Records functions without arguments, whose tensors stay where they are."""

    @abstractmethod
    def record(self, run: Ready) -> Ready:
        """Runs `run` some times; what is returned does the same, into the same result.

        `run` must give the same however often it is called, never wait for the device, and launch
        the same work whatever its tensors hold.
        """


class CudaGraphs(Recorder):
    """CUDA graphs that share a pool of memory: one runs at a time, and its result is copied before
    the next (as torch's notes on CUDA graphs ask)."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, run: Ready) -> Ready:
        """
        Raises:
            TreadleError: the pass does something that cannot be recorded.
        """
        cached = torch.is_autocast_cache_enabled()
        # A weight that was cast before the recording would be gone when it is replayed.
        torch.set_autocast_cache_enabled(False)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                result = run()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise TreadleError(
                f"the pass cannot be recorded as a CUDA graph: {reason}; take --decode Compiled or "
                "Eager"
            ) from error
        finally:
            torch.set_autocast_cache_enabled(cached)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
