"""Generalised advantage estimation.

    delta_t = r_t + gamma V(s_t+1) - V(s_t),    V = 0 after the end
    A_t = sum_k (gamma lambda)^k delta_t+k,     R_t = A_t + V(s_t)

Schulman et al. 2016, arXiv:1506.02438.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Estimates:
    advantages: Float[Tensor, " T"]
    returns: Float[Tensor, " T"]


def gae(
    rewards: Float[Tensor, " T"], values: Float[Tensor, " T"], *, gamma: float, lam: float
) -> Estimates:
    """Of one episode that ends after its last step."""
    advantages = torch.empty_like(rewards)
    ahead, following = 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        delta = float(rewards[t]) + gamma * following - float(values[t])
        ahead = delta + gamma * lam * ahead
        advantages[t] = ahead
        following = float(values[t])
    return Estimates(advantages, advantages + values)
