"""The LM head: log-probabilities of targets from hidden states, by the kernel that the machine has."""

import functools
import importlib.util
from collections.abc import Callable

from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.kernels import reference

# What some architectures do between the head and the softmax: a score without it would be wrong.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def head_weight(model: nn.Module) -> Tensor:
    """The weight [V, H] of a model's LM head. Raises UserError where the logits are more than hidden @ weight.T."""
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{name} has no LM head without a bias: score with a plain causal language model")
    config = model.config.get_text_config()
    for transform in _LOGIT_TRANSFORMS:
        if getattr(config, transform, None) not in (None, 1, 1.0):
            raise UserError(f"{name} transforms its logits ({transform}): score with a plain causal language model")
    return head.weight


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The natural log-probability of each target, fp32 [N], from hidden [N, H] and weight [V, H].

    Triton on CUDA if it is installed, tiled eager fp32 elsewhere; neither holds [N, V] logits.
    """
    return _kernel(hidden.is_cuda)(hidden, weight, targets)


@functools.cache
def _kernel(cuda: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if cuda and importlib.util.find_spec("triton") is not None:
        from slmfast.kernels.linear_logprob import linear_logprob as fused

        return fused
    return reference.linear_logprob
