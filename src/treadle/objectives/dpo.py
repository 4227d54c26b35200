"""Direct preference optimisation and its relatives: the policy is its own reward model.

    x(y)  = norm(log pi(y|p))                                    summed or averaged over tokens
    s(y)  = baseline(x(y))                                       what the answer is compared with
    z     = beta [s(y_w) - s(y_l)] - target
    L     = weight link(z) - anchor log pi(y_w|p) / |y_w|

for a chosen answer y_w and a rejected y_l to one prompt p. The members of the family are values
of these axes:

    DPO     sum    against reference    logistic                           arXiv:2305.18290
    cDPO    sum    against reference    logistic, label_smoothing > 0      Mitchell 2023
    robust  sum    against reference    unbiased under flips               arXiv:2403.00409
    IPO     mean   against reference    squared                            arXiv:2310.12036
    SLiC    sum    against reference    hinge                              arXiv:2305.10425
    SimPO   mean   none                 logistic, target > 0               arXiv:2405.14734
    CPO     sum    none                 logistic, anchor = 1               arXiv:2401.08417
    ORPO    mean   against 1 - p        logistic, anchor = 1               arXiv:2403.07691

The reference is the model before training; its log-probabilities come with the batch, computed
once (`alignment/preferences.py`). A confidence c in a pair's label makes its loss
c link(z) + (1 - c) link(-z).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from treadle.core.cards import Card
from treadle.core.config import Config
from treadle.core.errors import TreadleError
from treadle.data.batch import Batch
from treadle.kernels.linear_cross_entropy import token_logprobs
from treadle.models.decoder import DecoderModel
from treadle.nn.linear import bias_of
from treadle.objectives.objective import LossOutput, Objective, head_rule

CARD = Card(
    id="al.dpo",
    paper="Rafailov et al. 2023, arXiv:2305.18290, and the relatives in the file's table",
    summary="DPO, IPO, SLiC, SimPO, CPO, ORPO and robust DPO as values of the same axes.",
    recipe="treadle run dpo steps.dpo.source.pairs.path=pairs.jsonl",
    oracle="tests/objectives/test_objectives_dpo.py::test_losses_and_gradients_match_trl",
)


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of answers: sequence 2 i is chosen, sequence 2 i + 1 is rejected."""

    reference: Float[Tensor, " S"] | None = None
    """Log-probability of each sequence under the reference model."""
    confidence: Float[Tensor, " P"] | None = None
    """Probability that the label of each pair is right; None: all are."""
    margins: Float[Tensor, " P"] | None = None
    """How much better each chosen answer is; NaN where raters did not say."""


class Normalise(Config):
    """A shape: log-probabilities of answers of unequal length made comparable."""

    @abstractmethod
    def __call__(
        self, logp: Float[Tensor, " S"], lengths: Float[Tensor, " S"]
    ) -> Float[Tensor, " S"]:
        """From sums over an answer's tokens and their numbers."""


class SumOfTokens(Normalise):
    """The log-probability of the whole answer."""

    def __call__(
        self, logp: Float[Tensor, " S"], lengths: Float[Tensor, " S"]
    ) -> Float[Tensor, " S"]:
        return logp


class MeanOfTokens(Normalise):
    """The mean over its tokens."""

    def __call__(
        self, logp: Float[Tensor, " S"], lengths: Float[Tensor, " S"]
    ) -> Float[Tensor, " S"]:
        return logp / lengths


class Baseline(Config):
    """A shape: what an answer's log-probability is compared with."""

    @abstractmethod
    def __call__(
        self, logp: Float[Tensor, " S"], reference: Float[Tensor, " S"] | None
    ) -> Float[Tensor, " S"]:
        """Implicit rewards."""


class AgainstReference(Baseline):
    """log pi - log ref."""

    def __call__(
        self, logp: Float[Tensor, " S"], reference: Float[Tensor, " S"] | None
    ) -> Float[Tensor, " S"]:
        if reference is None:
            raise TreadleError(
                "this objective compares with a reference, but the source computes none: set "
                "source.reference='{kind: InitialModel}', or baseline='{kind: ReferenceFree}'"
            )
        return logp - reference


class ReferenceFree(Baseline):
    """log pi."""

    def __call__(
        self, logp: Float[Tensor, " S"], reference: Float[Tensor, " S"] | None
    ) -> Float[Tensor, " S"]:
        return logp


class AgainstComplement(Baseline):
    """The log odds log p - log(1 - p)."""

    def __call__(
        self, logp: Float[Tensor, " S"], reference: Float[Tensor, " S"] | None
    ) -> Float[Tensor, " S"]:
        # log1p(-e^x) loses its digits near 0 and -inf there has no gradient: an answer of
        # probability 1 is taken for one of 1 - 1e-7.
        complement = torch.log(-torch.expm1(logp.clamp(max=-1e-7)))
        return logp - complement


class Link(Config):
    """A shape: the loss of a scaled margin z."""

    @abstractmethod
    def __call__(self, z: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
        """Falls as z grows, as far as it should."""


class Logistic(Link):
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z)."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share eps of labels that are the wrong way round."""

    def __call__(self, z: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
        eps = self.label_smoothing
        return -(1 - eps) * F.logsigmoid(z) - eps * F.logsigmoid(-z)


class RobustLogistic(Link):
    """-[(1 - eps) log sigmoid(z) - eps log sigmoid(-z)] / (1 - 2 eps): its mean over labels flipped
    at the rate eps is the loss of the clean labels."""

    flipped: float = Field(0.1, ge=0.0, lt=0.5)
    """The rate eps."""

    def __call__(self, z: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
        eps = self.flipped
        clean = -(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)
        return clean / (1 - 2 * eps)


class Squared(Link):
    """(z / beta - 1 / (2 beta))^2: a margin to reach and not to exceed."""

    def __call__(self, z: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
        return ((z - 0.5) / beta).square()


class Hinge(Link):
    """max(0, 1 - z)."""

    def __call__(self, z: Float[Tensor, " P"], beta: float) -> Float[Tensor, " P"]:
        return F.relu(1 - z)


class DPO(Objective):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0.0)
    """How strongly the policy is held to the reference: the scale of margins."""
    normalise: Normalise = SumOfTokens()
    baseline: Baseline = AgainstReference()
    link: Link = Logistic()
    target: float = Field(0.0, ge=0.0)
    """The scaled margin that is asked for at the least (SimPO's gamma)."""
    weight: float = Field(1.0, gt=0.0)
    """Of the preference beside the anchor (ORPO's lambda)."""
    anchor: float = Field(0.0, ge=0.0)
    """Weight of the chosen answer's mean negative log-probability."""

    def __call__(self, model: DecoderModel, batch: PreferenceBatch) -> LossOutput:
        logp, lengths = sequence_logprobs(model, batch), batch.per_sequence(batch.weights)
        reference = batch.reference
        if reference is not None:
            reference = self.normalise(reference, lengths)
        scores = self.beta * self.baseline(self.normalise(logp, lengths), reference)
        chosen, rejected = scores.unflatten(0, (-1, 2)).unbind(-1)
        margin = chosen - rejected
        loss = self.weight * self.preference(margin, batch.confidence)
        if self.anchor:
            loss = loss - self.anchor * (logp / lengths)[::2]
        metrics = {
            "accuracy": (margin > 0).sum(),
            "margin": margin.detach().sum(),
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
        }
        pairs = batch.weights.new_tensor(batch.sequence_count / 2)
        return LossOutput(loss.sum(), pairs, metrics)

    def preference(
        self, margin: Float[Tensor, " P"], confidence: Float[Tensor, " P"] | None
    ) -> Float[Tensor, " P"]:
        """The loss of scaled margins; a pair without confidence counts for both orders alike."""
        loss = self.link(margin - self.target, self.beta)
        if confidence is None:
            return loss
        return confidence * loss + (1 - confidence) * self.link(-margin - self.target, self.beta)


def sequence_logprobs(model: DecoderModel, batch: Batch) -> Float[Tensor, " S"]:
    """Log-probability of each sequence of a batch."""
    hidden = model(batch.tokens, batch.context())
    logp = token_logprobs(
        hidden[batch.sources],
        model.head_weight(),
        batch.targets,
        bias=bias_of(model.head),
        rule=head_rule(model),
    )
    return batch.per_sequence(logp)


def ipo(beta: float = 0.1) -> DPO:
    """Azar et al. 2023; beta is the paper's tau."""
    return DPO(beta=beta, normalise=MeanOfTokens(), link=Squared())


def simpo(beta: float = 2.0, gamma: float = 1.0) -> DPO:
    """Meng et al. 2024."""
    return DPO(beta=beta, normalise=MeanOfTokens(), baseline=ReferenceFree(), target=gamma)


def cpo(beta: float = 0.1) -> DPO:
    """Xu et al. 2024."""
    return DPO(beta=beta, baseline=ReferenceFree(), anchor=1.0)


def orpo(weight: float = 0.1) -> DPO:
    """Hong et al. 2024; the weight is the paper's lambda."""
    return DPO(
        beta=1.0, normalise=MeanOfTokens(), baseline=AgainstComplement(), weight=weight, anchor=1.0
    )
