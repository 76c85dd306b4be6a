"""KTO: Kahneman-Tversky optimisation of unpaired desirable and undesirable replies.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv 2402.01306, equations 7 and 8, in
the form TRL trains: the reference point z0 comes from mismatched pairs inside small groups.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.model_folder import check_model_folder, write_tensors
from slmfast.progress import Progress
from slmfast.store import atomic_path, digest, model_digest
from slmfast.training.checkpoint import load_tensors
from slmfast.training.data import TokenSet, make_groups, rotated
from slmfast.training.logprobs import completion_logprobs, forward_precision, make_batch
from slmfast.training.settings import TrainSettings

if TYPE_CHECKING:  # at run time it would bring transformers' Trainer to all who only want kto_loss
    from slmfast.training.run import Run


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

    Returns:
        (losses [n], z0 [number of groups]).

    Raises:
        ValueError: the shapes differ, a label is neither 0 nor 1, or beta, a weight or group_size is out of range.
    """
    tensors = [torch.as_tensor(t) for t in (policy_logps, reference_logps, policy_kl_logps, reference_kl_logps)]
    policy, reference, policy_kl, reference_kl = tensors
    desirable = torch.as_tensor(labels, device=policy.device)
    if any(t.shape != policy.shape for t in [*tensors, desirable]) or policy.dim() != 1:
        raise ValueError("kto_loss takes five vectors of one length: " + ", ".join(str(list(t.shape)) for t in tensors))
    if desirable.dtype != torch.bool and not ((desirable == 0) | (desirable == 1)).all():
        raise ValueError("a KTO label is neither 0 nor 1: give bool, or 1 for desirable and 0 for undesirable")
    if group_size is not None and (not isinstance(group_size, Integral) or group_size < 2):
        raise ValueError(f"group_size is {group_size!r}: give a whole number of at least 2, or None for one group")
    if not isinstance(beta, Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta!r}: give a number above 0")
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        if not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(f"{name} is {weight!r}: give a number of at least 0")
    n = len(policy)
    groups = make_groups(n, group_size or max(n, 1))
    gaps = (policy_kl - reference_kl).detach()
    empty = gaps.new_zeros(0)
    z0 = torch.stack([gaps[group.start : group.stop].mean().clamp(min=0) for group in groups]) if groups else empty
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64, device=z0.device)
    gain = policy - reference - z0.repeat_interleave(sizes, output_size=n)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where the sigmoid is near 1.
    losses = torch.where(
        desirable.bool(),
        desirable_weight * torch.sigmoid(-beta * gain),
        undesirable_weight * torch.sigmoid(beta * gain),
    )
    return losses, z0


class KtoObjective:
    """The loss of KTO over groups of rows: its sum over samples, to be divided by the samples of the whole step."""

    def __init__(
        self, tokens: TokenSet, groups: Sequence[Sequence[int]], settings: TrainSettings, device: torch.device
    ):
        self._tokens, self._groups, self._settings, self._device = tokens, groups, settings, device
        self._labels = torch.as_tensor(tokens.labels, device=device)
        self._reference: Tensor | None = None  # float64 [2, rows]: matched and mismatched pairs
        self._noted: list[Tensor] = []  # rewards and z0 since the metrics were last read, kept on the device

    def set_reference(self, reference: Tensor) -> None:
        """Takes the reference's log-probabilities, float64 [2, rows], in the order of the rows."""
        self._reference = reference.to(self._device)

    def reference_logprobs(self, model: nn.Module, progress: bool = True) -> Tensor:
        """What a reference model gives the matched and the mismatched pairs, float64 [2, rows].

        The same code, batches and precision as the policy's: rewards of an untrained policy are exactly zero.
        """
        shown = Progress("train kto: reference", len(self._tokens), "rows") if progress else None
        parts = []
        with torch.no_grad():
            for group in range(len(self._groups)):
                parts.append(torch.stack([self._matched(model, group), self._mismatched(model, group)]).cpu())
                if shown:
                    shown.add(len(self._groups[group]))
        if shown:
            shown.close()
        return torch.cat(parts, dim=1)

    def size(self, groups: Sequence[int]) -> int:
        """How many samples these groups hold."""
        return sum(len(self._groups[group]) for group in groups)

    def loss_sum(self, model: nn.Module, group: int) -> Tensor:
        """The summed losses of one group, float64 scalar. The KL pass has no gradient."""
        rows = slice(self._groups[group].start, self._groups[group].stop)
        with torch.no_grad():
            mismatched = self._mismatched(model, group)
        matched = self._matched(model, group)
        reference, reference_kl = self._reference[:, rows]
        losses, z0 = kto_loss(
            matched,
            reference,
            mismatched,
            reference_kl,
            self._labels[rows],
            beta=self._settings.beta,
            desirable_weight=self._settings.desirable_weight,
            undesirable_weight=self._settings.undesirable_weight,
        )
        self._note(self._settings.beta * (matched.detach() - reference), self._labels[rows], z0)
        return losses.sum()

    def metrics(self) -> dict[str, float]:
        """What to log of the step just done: samples, mean z0, mean reward of each class and their margin."""
        good, bad, goods, bads, z0, groups = torch.stack(self._noted).sum(0).tolist()
        self._noted = []
        found = {"samples": goods + bads, "z0": z0 / groups}
        if goods:
            found["reward_desirable"] = good / goods
        if bads:
            found["reward_undesirable"] = bad / bads
        if goods and bads:
            found["margin"] = found["reward_desirable"] - found["reward_undesirable"]
        return found

    def _note(self, rewards: Tensor, desirable: Tensor, z0: Tensor) -> None:
        good = desirable.double()  # products and no indexing: a mask's size would be awaited from the device
        sums = [(rewards * good).sum(), (rewards * (1 - good)).sum(), good.sum(), (1 - good).sum(), z0.sum()]
        self._noted.append(torch.stack([*sums, z0.new_tensor(len(z0))]))

    def _matched(self, model: nn.Module, group: int) -> Tensor:
        return self._logprobs(model, self._groups[group], self._groups[group])

    def _mismatched(self, model: nn.Module, group: int) -> Tensor:
        return self._logprobs(model, self._groups[group], rotated(self._groups[group]))

    def _logprobs(self, model: nn.Module, prompts: Sequence[int], completions: Sequence[int]) -> Tensor:
        pairs = [
            (self._tokens.prompts[prompt], self._tokens.completions[completion])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        with forward_precision(self._settings.forward, self._device):
            return completion_logprobs(model, make_batch(pairs, self._device))


def train_kto(
    model: str | Path,
    dataset: str | Path,
    output: str | Path,
    settings: TrainSettings,
    *,
    reference: str | Path | None = None,
    seed: int = 0,
    threads: int = 0,
    work: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Tunes a model on labelled replies with KTO and writes a complete fp32 model folder.

    The arguments are those of `train_sft`, with method "kto" and a dataset that also has `label` (true: desirable).

    Args:
        reference: folder of the reference model, by default the starting model itself: KTO after SFT is held to the
            SFT model. Its log-probabilities are computed once, before training, and kept in `work`.

    Raises:
        UserError: as `train_sft`; also a set without one of the two labels.
    """
    from slmfast.training.run import Run, train

    start, held = Path(model), check_model_folder(Path(reference or model))
    run = Run(start, Path(dataset), Path(output), settings, seed, threads, work and Path(work), progress)

    def objective(policy: nn.Module, tokens: TokenSet, groups: list[range], device: torch.device) -> KtoObjective:
        made = KtoObjective(tokens, groups, settings, device)
        made.set_reference(_reference(made, run, policy, held, device))
        return made

    return train(run, "kto", objective, inputs={"reference": model_digest(held)})


def _reference(made: KtoObjective, run: "Run", policy: nn.Module, held: Path, device: torch.device) -> Tensor:
    """The reference's log-probabilities, from the work folder where an earlier start left them."""
    from slmfast.training.run import load_model

    path = run.work_folder / f"reference-{digest([run.fingerprint, model_digest(held)])}.safetensors"
    if not path.exists():
        model = policy if held.resolve() == run.model.resolve() else load_model(held).to(device)
        values = made.reference_logprobs(model.eval(), run.progress)
        if not values.isfinite().all():
            raise UserError(f"the reference {held} gives a reply a log-probability that is not finite: check the model")
        with atomic_path(path) as temporary:
            write_tensors(temporary, {"logprobs": tuple(values.shape)}, torch.float64, [values])
    return load_tensors(path)["logprobs"]
