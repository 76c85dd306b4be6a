"""Packs of any size give one step; each sample is held to its own group; memory's lack halves the packs."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from slmfast.errors import UserError
from slmfast.training import trainer
from slmfast.training.data import load_tokens, make_groups, rotated
from slmfast.training.kto import KtoObjective, train_kto
from slmfast.training.loading import load_model, load_tokenizer
from slmfast.training.pack_budget import PackBudget, bytes_per_token
from slmfast.training.passes import Passes
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective, train_sft

PASSES = Passes("fp32", False, torch.device("cpu"))
KTO = TrainSettings(
    method="kto", learning_rate=1e-3, epochs=2, accumulation=2, beta=0.3, undesirable_weight=1.5, desirable_weight=0.7
)
SFT = replace(KTO, method="sft")
WHOLE = 1 << 20


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture
def sharing_set(make_set):
    """19 rows, of which every third has the prompt of the row three before it: groups of 4, 4, 4, 4 and 3."""
    prompts = [said("user", f"question {i if i % 3 else 7}: {'why? ' * (i % 3 * 4)}") for i in range(19)]
    return make_set(19, labels=True, prompt=prompts)


@pytest.fixture
def unlabelled(sharing_set):
    """The same rows for SFT, which takes no set of good and bad replies."""
    pq.write_table(pq.read_table(sharing_set).drop_columns("label"), sharing_set.with_name("unlabelled.parquet"))
    return sharing_set.with_name("unlabelled.parquet")


@pytest.fixture
def tokens(sharing_set, tiny_model):
    return load_tokens(sharing_set, load_tokenizer(tiny_model), KTO)


@pytest.fixture
def plain(tiny_model, other_tiny_model, tokens):
    """What a policy and a reference give matched and mismatched pairs, from the logits of one sequence at a time."""
    groups = make_groups(len(tokens), 4)
    partners = [other for group in groups for other in rotated(group)]

    def logps(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        model = load_model(folder).eval()
        rows = range(len(tokens))
        return tuple(torch.tensor([one(model, row, of[row]) for row in rows]) for of in (rows, partners))

    def one(model, row: int, other: int) -> float:
        prompt, completion = tokens.prompts[row].tolist(), tokens.completions[other].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        picked = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
        return float(picked.sum())

    return logps(tiny_model), logps(other_tiny_model)


def step(objective, model, groups, budget):
    """Loss, gradients and metrics of one step."""
    model.zero_grad()
    loss = float(objective.accumulate(model, groups, budget, torch.Tensor.backward))
    return loss, torch.cat([p.grad.flatten().double() for p in model.parameters()]), objective.metrics()


def kto_objective(tokens, settings, reference, budget=WHOLE):
    objective = KtoObjective(tokens, make_groups(len(tokens), 4), settings, PASSES)
    held = load_model(reference).eval()
    objective.set_reference(objective.reference_logprobs(held, [[0, 1], [2, 3], [4]], budget, progress=False))
    return objective


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_packs_of_any_size_give_the_same_step(tokens, tiny_model, other_tiny_model, method):
    model, groups = load_model(tiny_model).eval(), [3, 0, 4, 1]
    results = []
    for budget in (WHOLE, 400, 150, 64, 1):
        if method == "kto":
            objective = kto_objective(tokens, KTO, other_tiny_model, budget)
        else:
            objective = SftObjective(tokens, make_groups(len(tokens), 4), PASSES)
        results.append(step(objective, model, groups, budget))
    packs = [metrics.pop("packs") for _, _, metrics in results]
    assert packs[0] == 1 and packs == sorted(packs) and packs[-2] > 5 and packs[-1] == 15
    loss, gradient, metrics = results[0]
    for other_loss, other_gradient, other_metrics in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other_gradient - gradient).norm() < 1e-6 * gradient.norm()
        assert other_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("budget", [WHOLE, 100])
@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [4, 1], [2], [4]])
def test_each_sample_is_held_to_its_own_group(tokens, plain, tiny_model, other_tiny_model, groups, budget):
    (policy, policy_kl), (reference, reference_kl) = plain
    formed = make_groups(len(tokens), 4)
    losses, points = [], []
    for rows in (list(formed[group]) for group in groups):
        z0 = max(0.0, float((policy_kl[rows] - reference_kl[rows]).mean()))
        points.append(z0)
        for row in rows:
            gain = float(policy[row] - reference[row])
            weight, margin = (0.7, gain - z0) if tokens.labels[row] else (1.5, z0 - gain)
            losses.append(weight * (1 - float(torch.sigmoid(torch.tensor(0.3 * margin, dtype=torch.float64)))))
    assert max(points) > 0.1 or len(groups) == 1  # else the reference point is not tested

    objective = kto_objective(tokens, KTO, other_tiny_model, budget)
    loss, _, metrics = step(objective, load_model(tiny_model).eval(), groups, budget)
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert metrics["z0"] == pytest.approx(sum(points) / len(points), abs=1e-5)
    assert metrics["samples"] == len(losses)


@pytest.mark.parametrize("label", [True, False])
def test_a_step_of_one_class_has_no_margin(tokens, tiny_model, other_tiny_model, label):
    tokens.labels[:8] = label
    _, gradient, metrics = step(kto_objective(tokens, KTO, other_tiny_model), load_model(tiny_model), [0, 1], WHOLE)
    assert gradient.isfinite().all()
    known, unknown = ("reward_desirable", "reward_undesirable")[:: 1 if label else -1]
    assert known in metrics and not {unknown, "margin"} & metrics.keys()


def test_a_prompt_of_several_replies_goes_in_once(tokens, tiny_model):
    """Rows 0, 3, 6, ... have one prompt, and all prompts one beginning: a pack holds each token of them once."""
    model = load_model(tiny_model)
    pairs = [(tokens.prompts[row], tokens.completions[row]) for row in range(0, 19, 3)]
    with PASSES.training(model, pairs, WHOLE) as packs:
        (pack,) = packs
    replies = {completion[:-1].tobytes(): len(completion) - 1 for _, completion in pairs}
    assert pack.tokens <= len(pairs[0][0]) + sum(len(completion) - 1 for _, completion in pairs)
    assert pack.tokens >= len(pairs[0][0]) + max(replies.values())


def test_apo_zero_runs_no_mismatched_pair(tokens, tiny_model, monkeypatch):
    def ran(*args):
        raise AssertionError("a mismatched pair was run")

    monkeypatch.setattr(Passes, "score", ran)
    objective = kto_objective(tokens, replace(KTO, loss_type="apo_zero_unpaired"), tiny_model)
    _, _, metrics = step(objective, load_model(tiny_model), [0, 1], WHOLE)
    assert metrics["z0"] == 0.0 and metrics["reward_desirable"] == 0.0


def test_an_untrained_policy_has_zero_rewards_in_every_step_of_the_first_epoch(tokens, tiny_model):
    objective, model = kto_objective(tokens, KTO, tiny_model, 100), load_model(tiny_model).eval()
    for groups in ([0, 1], [2, 3], [4]):
        _, _, metrics = step(objective, model, groups, 100)
        assert metrics["reward_desirable"] == metrics["reward_undesirable"] == metrics["z0"] == 0.0
    _, _, metrics = step(objective, model, [1, 4], 100)  # a later epoch's: other packs, other rounding
    assert abs(metrics["reward_desirable"]) < 1e-5 and metrics["z0"] < 1e-5


# What follows injects the lack of memory.

DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried ...")
PACKED = replace(KTO, pack_tokens=300, save_steps=2)


def fail_at(monkeypatch, number: int, error: Exception, name: str = "train_logprobs") -> None:
    """Makes the `number`-th call of a method of Passes fail once, when its work is done."""
    original, calls = getattr(Passes, name), []

    def counted(*args):
        result = original(*args)
        calls.append(1)
        if len(calls) == number:
            raise error
        return result

    monkeypatch.setattr(Passes, name, counted)


def log_of(output: Path) -> list[dict]:
    return json.loads((output / "training_log.json").read_text())


def packs_of(log: list[dict]) -> list[int]:
    return [row["packs"] for row in log]


@pytest.mark.parametrize("error", [DEVICE, HOST], ids=["CUDA", "CPU"])
@pytest.mark.parametrize("pack", [1, 2])
def test_a_step_that_the_memory_does_not_hold_is_repeated_whole(
    tiny_model, sharing_set, tmp_path, monkeypatch, error, pack
):
    calm = log_of(train_kto(tiny_model, sharing_set, tmp_path / "calm", PACKED, progress=False))
    assert packs_of(calm)[:2] == [2, 2]
    before = 5 + sum(packs_of(calm)[:1])  # the reference's packs, as many as a first epoch has, and step 1's
    assert sum(packs_of(calm)[:3]) == 5
    fail_at(monkeypatch, before + pack, error)
    output = train_kto(tiny_model, sharing_set, tmp_path / "short", PACKED, progress=False)
    found = log_of(output)
    assert [row["pack_tokens"] for row in found] == [300, *[150] * 5]
    assert found[1]["packs"] > calm[1]["packs"]
    for ours, theirs in zip(found, calm, strict=True):  # a gradient kept from the failed try would show in its norm
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert json.loads((output / "training.json").read_text())["pack_tokens"] == [[0, 300], [1, 150]]


def test_a_reference_that_the_memory_does_not_hold_is_begun_again(tiny_model, sharing_set, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2, DEVICE, "same_without_gradient")
    found = log_of(train_kto(tiny_model, sharing_set, tmp_path / "S2", PACKED, progress=False))
    assert {row["pack_tokens"] for row in found} == {150}
    assert found[0]["reward_desirable"] == found[0]["z0"] == 0.0


def test_a_resumed_run_takes_the_packs_that_it_had(tiny_model, unlabelled, tmp_path, monkeypatch):
    """Steps 1 and 2 in large packs, from the third on in small ones, whether or not a run is resumed between them."""

    def run(name: str) -> Path:
        return train_sft(tiny_model, unlabelled, tmp_path / name, replace(PACKED, method="sft"), progress=False)

    fail_at(monkeypatch, 5, DEVICE)
    calm = run("calm")
    assert [row["pack_tokens"] for row in log_of(calm)] == [300, 300, 150, 150, 150, 150]
    monkeypatch.undo()

    fail_at(monkeypatch, 5, DEVICE)
    original = trainer.StepTrainer.training_step

    def stopped(self, *args):
        if self.state.global_step == 3:
            raise InterruptedError
        return original(self, *args)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", stopped)
    with pytest.raises(InterruptedError):
        run("killed")
    assert (tmp_path / ".work" / "killed" / "checkpoint-2").exists()
    monkeypatch.undo()
    assert log_of(run("killed")) == log_of(calm)
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == (calm / "model.safetensors").read_bytes()


def test_memory_that_does_not_hold_one_sequence_is_one_line(tiny_model, unlabelled, tmp_path, monkeypatch):
    def never(*args):
        raise DEVICE

    monkeypatch.setattr(Passes, "train_logprobs", never)
    with pytest.raises(UserError, match=r"does not hold a sequence of 9. tokens.*: set checkpointing to on"):
        train_sft(tiny_model, unlabelled, tmp_path / "S1", replace(SFT, pack_tokens=300), progress=False)
    assert not (tmp_path / "S1").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny_model, unlabelled, tmp_path, monkeypatch):
    fail_at(monkeypatch, 1, RuntimeError("expected scalar type Float but found Half"))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train_sft(tiny_model, unlabelled, tmp_path / "S1", SFT, progress=False)


def test_a_budget_is_that_of_its_step_and_outlives_the_process(tmp_path):
    mark = tmp_path / "run.json"
    mark.write_text('{"fingerprint": "x"}')
    budget = PackBudget(mark, lambda: 1000)
    lacking = iter([True, True, False])

    def compute(tokens: int) -> int:
        if next(lacking):
            raise DEVICE
        return tokens

    undone = []
    assert budget.run(7, 100, compute, lambda: undone.append(1)) == 250
    assert len(undone) == 2
    again = PackBudget(mark, lambda: pytest.fail("it was chosen already"))
    assert [again.at(step) for step in (0, 6, 7, 900)] == [1000, 1000, 250, 250]
    assert json.loads(mark.read_text())["fingerprint"] == "x"


def test_checkpointing_leaves_room_for_more_tokens(tiny_model):
    config = load_model(tiny_model).config
    config.num_hidden_layers = 24
    assert bytes_per_token(config, True) < bytes_per_token(config, False) / 5
