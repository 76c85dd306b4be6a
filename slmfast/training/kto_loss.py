"""The loss of KTO, Kahneman-Tversky optimisation of unpaired desirable and undesirable replies.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, equations 7 and 8, in
the form TRL trains: the reference point z0 comes from mismatched pairs inside small groups.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from slmfast.training.data import make_groups
from slmfast.training.settings import LOSS_TYPES

NO_LABEL = "a KTO label is neither 0 nor 1: give bool, or 1 for desirable and 0 for undesirable"


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    policy_kl_logps: Tensor,
    reference_kl_logps: Tensor,
    labels: Any,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    group_size: int | None = None,
    loss_type: str = "kto",
) -> tuple[Tensor, Tensor]:
    """The KTO loss of every sample, and the reference point of every group.

    With r = policy - reference and, per group, z0 = max(0, mean(policy_kl - reference_kl)), detached:
    a desirable reply costs desirable_weight * (1 - sigmoid(beta * (r - z0))),
    an undesirable one undesirable_weight * (1 - sigmoid(beta * (z0 - r))). The loss of a step is their mean.

    Args:
        policy_logps, reference_logps: [n] log-probabilities of whole completions, in nats.
        policy_kl_logps, reference_kl_logps: [n] the same of the mismatched pairs.
        labels: [n] bool or 0/1, is the completion desirable?
        group_size: samples that share one z0, counted from the start; a last group of one joins the group before it.
            None makes all n samples one group.
        loss_type: "kto", or "apo_zero_unpaired" (D'Oosterlinck et al., "Anchored Preference Optimization", arXiv
            2408.06266, for single replies as TRL has it), whose reference point is always 0.

    Returns:
        (losses [n], z0 [number of groups]).

    Raises:
        ValueError: the shapes differ, a label is neither 0 nor 1, loss_type is unknown, or beta, a weight or
            group_size is out of range.
    """
    tensors = [torch.as_tensor(t) for t in (policy_logps, reference_logps, policy_kl_logps, reference_kl_logps)]
    policy, reference, policy_kl, reference_kl = tensors
    try:
        desirable = torch.as_tensor(labels, device=policy.device)
    except (ValueError, TypeError, RuntimeError) as error:  # text, None, lists of lists
        raise ValueError(NO_LABEL) from error
    if any(t.shape != policy.shape for t in [*tensors, desirable]) or policy.dim() != 1:
        raise ValueError("kto_loss takes five vectors of one length: " + ", ".join(str(list(t.shape)) for t in tensors))
    if desirable.dtype != torch.bool and not ((desirable == 0) | (desirable == 1)).all():
        raise ValueError(NO_LABEL)
    if group_size is not None and (not isinstance(group_size, Integral) or group_size < 2):
        raise ValueError(f"group_size is {group_size!r}: give a whole number of at least 2, or None for one group")
    if not isinstance(beta, Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta!r}: give a number above 0")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}: give a number of at least 0")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}: give one of {', '.join(LOSS_TYPES)}")
    n = len(policy)
    sizes = [len(group) for group in make_groups(n, group_size or max(n, 1))]
    gaps = policy_kl - reference_kl
    z0 = reference_points(gaps, sizes) if loss_type == "kto" else gaps.new_zeros(len(sizes))
    points = z0.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device=z0.device), output_size=n)
    return sample_losses(policy - reference - points, desirable.bool(), beta, desirable_weight, undesirable_weight), z0


def reference_points(gaps: Tensor, sizes: Sequence[int]) -> Tensor:
    """The reference point of each group, from how far the policy is from the reference at mismatched pairs [n]."""
    if not sizes:
        return gaps.new_zeros(0)
    return torch.stack([group.mean().clamp(min=0) for group in gaps.detach().split(list(sizes))])


def sample_losses(margin: Tensor, desirable: Tensor, beta: float, good: float, bad: float) -> Tensor:
    """The loss of each sample [n] from its margin r - z0; 1 - sigmoid(x) is sigmoid(-x), which keeps its digits."""
    return torch.where(desirable, good * torch.sigmoid(-beta * margin), bad * torch.sigmoid(beta * margin))
