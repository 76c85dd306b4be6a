"""KTO: training on unpaired replies, each labelled desirable or undesirable, held to a reference model."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.model_folder import check_model_folder, write_tensors
from slmfast.progress import Progress
from slmfast.store import atomic_path, digest, model_digest
from slmfast.training.arguments import Run
from slmfast.training.checkpoint import load_tensors
from slmfast.training.data import TokenSet, longest_sequence, rotated
from slmfast.training.extras import add_extras
from slmfast.training.kto_loss import reference_points, sample_losses
from slmfast.training.loading import load_model
from slmfast.training.passes import Pair, Passes, numbers, split_weights
from slmfast.training.run import Setup, train
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import masters_of


class KtoObjective:
    """The loss of KTO: the mean over a step's samples, each held to the reference point of its own group.

    A step first runs its mismatched pairs, without gradients, in packs of their own: with every group's z0 known, a
    pack of the policy may hold samples of any groups.
    """

    def __init__(self, tokens: TokenSet, groups: Sequence[Sequence[int]], settings: TrainSettings, passes: Passes):
        self._tokens, self._groups, self._settings, self._passes = tokens, groups, settings, passes
        self._labels = torch.as_tensor(tokens.labels, device=passes.device)
        self._reference: Tensor | None = None  # float64 [2, rows]: matched and mismatched pairs
        self._noted: Tensor | None = None  # sums over the step just done, kept on the device

    def set_reference(self, reference: Tensor) -> None:
        """Takes the reference's log-probabilities, float64 [2, rows], in the order of the rows."""
        self._reference = reference.to(self._passes.device)

    def reference_logprobs(
        self, model: nn.Module, steps: Sequence[Sequence[int]], budget: int, progress: bool = True
    ) -> Tensor:
        """What a reference model gives the matched and the mismatched pairs, float64 [2, rows].

        The policy's own kernels and precision, and the packs of `steps`, the groups of each step of the first epoch:
        there the rewards and z0 of an untrained policy are zero to the bit. Later epochs pack other groups together,
        and with that the rounding changes: in fp32 by about 1e-6 of a log-probability.

        The second row is zero where the loss takes no mismatched pairs.
        """
        shown = Progress("train kto: reference", len(self._tokens), "rows") if progress else None
        found = torch.zeros(2, len(self._tokens), dtype=torch.float64)
        for groups in steps:
            rows = self._rows(groups)
            found[0, rows] = self._passes.same_without_gradient(model, self._matched(rows), budget).cpu()
            if self._settings.takes_pairs:
                found[1, rows] = self._passes.score(model, self._mismatched(groups), budget).cpu()
            if shown:
                shown.add(len(rows))
        if shown:
            shown.close()
        return found

    def accumulate(
        self, model: nn.Module, groups: Sequence[int], budget: int, backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Adds the gradient of a step's loss, pack by pack; the loss, float64 scalar."""
        rows = self._rows(groups)
        z0 = self._reference_points(model, groups, rows, budget)
        sizes = torch.tensor([len(self._groups[group]) for group in groups], device=z0.device)
        points = z0.repeat_interleave(sizes, output_size=len(rows))
        desirable, reference = self._labels[rows], self._reference[0, rows]
        total, packs = torch.zeros_like(points[0]), 0
        rewards = torch.empty_like(points)
        with self._passes.training(model, self._matched(rows), budget) as batches:
            for batch in batches:
                mine = numbers(batch)
                gain = self._passes.train_logprobs(model, batch) - reference[mine]
                loss = self._losses(gain - points[mine], desirable[mine]).sum() / len(rows)
                backward(loss)
                total += loss.detach()
                rewards[mine] = self._settings.beta * gain.detach()
                packs += 1
        good = desirable.double()  # products and no indexing: a mask's size would be awaited from the device
        sums = [(rewards * good).sum(), (rewards * (1 - good)).sum(), good.sum(), (1 - good).sum(), z0.mean()]
        self._noted = torch.stack([*sums, z0.new_tensor(packs)])
        return total

    def longest(self, groups: Sequence[int]) -> int:
        """The most tokens that a sequence of these groups has, mismatched pairs included."""
        return longest_sequence(self._tokens, [self._groups[group] for group in groups], self._settings.takes_pairs)

    def metrics(self) -> dict[str, float]:
        """What to log of the step just done: samples, packs, mean z0, mean reward of each class and their margin."""
        good, bad, goods, bads, z0, packs = self._noted.tolist()
        found = {"samples": int(goods + bads), "packs": int(packs), "z0": z0}
        if goods:
            found["reward_desirable"] = good / goods
        if bads:
            found["reward_undesirable"] = bad / bads
        if goods and bads:
            found["margin"] = found["reward_desirable"] - found["reward_undesirable"]
        return found

    def _reference_points(self, model: nn.Module, groups: Sequence[int], rows: list[int], budget: int) -> Tensor:
        """z0 of each group, float64 [groups]."""
        if not self._settings.takes_pairs:
            return torch.zeros(len(groups), dtype=torch.float64, device=self._passes.device)
        policy = self._passes.score(model, self._mismatched(groups), budget)
        return reference_points(policy - self._reference[1, rows], [len(self._groups[group]) for group in groups])

    def _losses(self, margin: Tensor, desirable: Tensor) -> Tensor:
        told = self._settings
        return sample_losses(margin, desirable, told.beta, told.desirable_weight, told.undesirable_weight)

    def _rows(self, groups: Sequence[int]) -> list[int]:
        return [row for group in groups for row in self._groups[group]]

    def _matched(self, rows: Sequence[int]) -> list[Pair]:
        return [(self._tokens.prompts[row], self._tokens.completions[row]) for row in rows]

    def _mismatched(self, groups: Sequence[int]) -> list[Pair]:
        pairs = zip(self._rows(groups), self._partners(groups), strict=True)
        return [(self._tokens.prompts[row], self._tokens.completions[other]) for row, other in pairs]

    def _partners(self, groups: Sequence[int]) -> list[int]:
        """For each row of these groups the one whose completion makes the mismatched pair with its prompt."""
        return [row for group in groups for row in rotated(self._groups[group])]


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
    start, held = Path(model), check_model_folder(Path(reference or model))
    run = Run(start, Path(dataset), Path(output), settings, seed, threads, work and Path(work), progress)

    def objective(policy: nn.Module, setup: Setup) -> KtoObjective:
        made = KtoObjective(setup.tokens, setup.groups, settings, setup.passes)
        made.set_reference(_reference(made, run, policy, held, setup))
        return made

    return train(run, "kto", objective, models={"reference": held})


def _reference(made: KtoObjective, run: Run, policy: nn.Module, held: Path, setup: Setup) -> Tensor:
    """The reference's log-probabilities, from the work folder where an earlier start left them."""
    path = run.work_folder / f"reference-{digest([run.fingerprint, model_digest(held)])}.safetensors"
    if not path.exists():
        values = _asked(made, run, policy, held, setup)
        gc.collect()  # a second model is in cycles of references, and would stay beside the gradients
        if not values.isfinite().all():
            raise UserError(f"the reference {held} gives a reply a log-probability that is not finite: check the model")
        with atomic_path(path) as temporary:
            write_tensors(temporary, {"logprobs": tuple(values.shape)}, torch.float64, [values])
    return load_tensors(path)["logprobs"]


def _asked(made: KtoObjective, run: Run, policy: nn.Module, held: Path, setup: Setup) -> Tensor:
    """The log-probabilities by the reference model, which is nobody's once this returns."""
    model = policy if held.resolve() == run.model.resolve() else _load_reference(held, policy, run, setup.passes)
    steps = [setup.order[step].tolist() for step in range(setup.order.steps_per_epoch)]
    return setup.budget.run(
        step=0,
        longest=made.longest(range(len(setup.groups))),
        compute=lambda tokens: made.reference_logprobs(model.eval(), steps, tokens, run.progress),
        undo=lambda: None,
    )


def _load_reference(held: Path, policy: nn.Module, run: Run, passes: Passes) -> nn.Module:
    """A reference other than the starting model, which runs as the policy does: split, adapted, or neither."""
    model = load_model(held)
    add_extras(model, run.settings, run.seed)
    model.to(passes.device)
    if masters_of(policy) is not None:
        split_weights(model, passes.forward)
    return model
