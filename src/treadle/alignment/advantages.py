"""Advantages: how much better a completion did than its group.

group-normalised   A = (r - mean) / (std + eps)              GRPO, arXiv:2402.03300
group-centred      A = r - mean                              Dr. GRPO, arXiv:2503.20783
leave-one-out      A = r - mean of the others                RLOO, arXiv:2402.14740
batch-normalised   A = (r - mean) / std, of the batch        REINFORCE++, arXiv:2501.03262
centred in groups, then divided by the batch's std           REINFORCE++-baseline, ibid.

With several processes the batch is what one of them has.
"""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from treadle.core.config import Config


class Advantage(Config):
    """A shape: rewards of groups to advantages."""

    @abstractmethod
    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        """Advantages of G completions for each of P prompts."""


class GroupNormalised(Advantage):
    """Centred and divided by the group's standard deviation (unbiased)."""

    eps: float = 1e-4

    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        return centred(rewards) / (rewards.std(-1, keepdim=True) + self.eps)


class GroupCentred(Advantage):
    """Centred only, so that groups of nearly equal rewards do not count as much as others."""

    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        return centred(rewards)


class LeaveOneOut(Advantage):
    """Against the mean of the others, an unbiased baseline: centred, times G / (G - 1)."""

    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        group = rewards.shape[-1]
        return centred(rewards) * group / (group - 1)


class BatchNormalised(Advantage):
    """Against all completions of the step, whatever their prompts."""

    eps: float = 1e-8

    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        return centred(rewards.reshape(1, -1)).view_as(rewards) / (rewards.std() + self.eps)


class GroupCentredBatchNormalised(Advantage):
    """Against the group, in units of the step's standard deviation."""

    eps: float = 1e-8

    def __call__(self, rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
        own = centred(rewards)
        return own / (own.std() + self.eps)


def centred(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Less the mean of each row; exactly 0 where all are equal, whatever the mean is rounded to."""
    apart = rewards - rewards[:, :1]
    return apart - apart.mean(-1, keepdim=True)
