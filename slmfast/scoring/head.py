"""The LM head: log-probabilities of targets from hidden states, by the kernel that the machine has."""

import torch
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.kernels import head_op
from slmfast.scoring.loading import evaluating
from slmfast.scoring.probes import remembered

# What some architectures do between the head and the softmax: a score without it would be wrong. These are known by
# name, for small logits may hide them; a short forward finds the others.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_PROBE_TOKENS = 4
_PROBE_ROWS = 4096  # of the vocabulary, evenly spread: each costs reading a row of the largest matrix once more


def head_weight(model: nn.Module) -> Tensor:
    """The weight [V, H] of a model's LM head. Raises UserError where the logits are more than hidden @ weight.T."""
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None or getattr(head, "bias", None) is not None:
        raise UserError(f"{name} has no LM head without a bias: take a plain causal language model")
    config = model.config.get_text_config()
    for transform in _LOGIT_TRANSFORMS:
        if getattr(config, transform, None) not in (None, 1, 1.0):
            raise UserError(f"{name} transforms its logits ({transform}): take a plain causal language model")
    if not remembered(_is_plain, model):
        raise UserError(f"{name} does more to its logits than its LM head's matrix: take a plain causal language model")
    return head.weight


def _is_plain(model: nn.Module) -> bool:
    """Whether the model's own logits of a few tokens are hidden @ weight.T, but for rounding."""
    weight = model.get_output_embeddings().weight
    ids = torch.arange(_PROBE_TOKENS, device=weight.device)[None] % len(weight)
    kept: list[Tensor] = []
    with evaluating(model):
        hook = model.get_decoder().register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state))
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
    some = slice(None, None, max(1, len(weight) // _PROBE_ROWS))
    with torch.no_grad():
        plain = nn.functional.linear(kept[0], weight[some]).float()
    logits = logits[..., some].float()
    # Some rows of logits may be no numbers: that is for the score itself to find.
    slack = 1e-4 if weight.dtype == torch.float32 else 2e-2
    largest = float(plain.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return logits.shape == plain.shape and torch.allclose(
        logits, plain, rtol=slack, atol=slack * largest, equal_nan=True
    )


@torch.no_grad()
def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The natural log-probability of each target, fp32 [N], from hidden [N, H] and weight [V, H].

    With `entropy` also the entropy of the whole distribution at each position, in nats, fp32 [N]. The kernel is the
    one that suits the machine; none holds [N, V] logits.
    """
    logprob, spread, _ = head_op.linear_logprob(hidden, weight, targets, entropy)
    return (logprob, spread) if entropy else logprob


@torch.no_grad()
def target_scores(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear_logprob` gives, and whether no word is likelier than the target, bool [N]."""
    logprob, _, greedy = head_op.linear_logprob(hidden, weight, targets, False)
    return logprob, greedy
