"""All random states of a process, as one thing with a state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RandomState:
    """Python's, numpy's and torch's global generators, of the CPU and of every CUDA device."""

    def state(self) -> dict[str, Any]:
        version, keys, gauss = random.getstate()
        legacy = np.random.get_state(legacy=False)
        assert isinstance(legacy, dict)
        return {
            "python": {"version": version, "keys": list(keys), "gauss": gauss},
            "numpy": {
                "keys": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
                "position": int(legacy["state"]["pos"]),
                "has_gauss": int(legacy["has_gauss"]),
                "gauss": float(legacy["gauss"]),
            },
            "torch": torch.get_rng_state(),
            "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["keys"]), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state(
            ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
        )
        torch.set_rng_state(state["torch"])
        for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda, device)


def seed_everything(seed: int) -> None:
    """Seed the global generators; derive each rank's own with `seed + rank`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
