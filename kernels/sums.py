"""What every path through the LM head leaves of its logits, and what follows from that.

Shapes: N positions.
"""

from typing import NamedTuple

from torch import Tensor


class LogSums(NamedTuple):
    """Four numbers of each position about its logits l, each fp32 [N]."""

    picked: Tensor  # the target's logit
    maximum: Tensor  # the largest logit m
    total: Tensor  # the sum of exp(l - m)
    weighted: Tensor  # the sum of exp(l - m) (l - m), where the entropy was asked for

    def logprob(self) -> Tensor:
        """log softmax of the target. A difference to the log-sum-exp itself would lose the bits that its size takes."""
        return (self.picked - self.maximum) - self.total.log()

    def entropy(self) -> Tensor:
        """The entropy of the whole distribution, in nats."""
        return self.total.log() - self.weighted / self.total

    def greedy(self) -> Tensor:
        """Whether no word is likelier than the target, bool [N]. The target's logit is the one that the maximum saw."""
        return self.picked >= self.maximum

    def log_sum_exp(self) -> Tensor:
        """log(sum(exp(l))): the probability of a word is exp(l - this)."""
        return self.maximum + self.total.log()

    def found(self, entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities, with entropies if asked."""
        return (self.logprob(), self.entropy()) if entropy else self.logprob()
