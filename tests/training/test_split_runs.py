"""Whole runs with split weights: the step of whole ones, nothing lost at 1e-8, and what each forward saw of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from slmfast import miniature
from slmfast.fusion import SurvivalCounter, update_survival
from slmfast.miniature.replies import wrong_reply
from slmfast.miniature.skills import SKILLS, draw_item
from slmfast.records import MESSAGE
from slmfast.training import run
from slmfast.training.data import load_tokens, make_groups
from slmfast.training.forward_sees import multiplied
from slmfast.training.kto import KtoObjective, train_kto
from slmfast.training.loading import load_model, load_tokenizer
from slmfast.training.logprobs import head_operands, seen_head
from slmfast.training.optimizer import EPS
from slmfast.training.pack_budget import PackBudget
from slmfast.training.passes import Passes, split_weights
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective, train_sft
from slmfast.training.split_weights import masters_of, merge

CPU = torch.device("cpu")
FORWARDS = ["bf16", "split", "fp32"]
SFT = TrainSettings(
    method="sft", learning_rate=1e-3, epochs=7, accumulation=2, schedule="constant", optimizer="adamw8bit-split"
)
KTO = replace(SFT, method="kto")
WHOLE = 1 << 20


def log_of(output):
    return json.loads((output / "training_log.json").read_text())


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def split_model(folder, forward):
    model = load_model(folder).eval()
    split_weights(model, forward)
    assert len(masters_of(model).low) > 8
    return model


def gradients(model):
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.fixture
def tokens(kto_set, wide_model):
    return load_tokens(kto_set, load_tokenizer(wide_model), KTO)


def sft_objective(tokens, forward, checkpointing=False):
    return SftObjective(tokens, make_groups(len(tokens), 4), Passes(forward, checkpointing, CPU))


# Steps.


@pytest.mark.parametrize("method", ["sft", "kto"])
def test_twenty_steps_are_those_of_whole_weights(wide_model, sft_set, kto_set, tmp_path, method):
    """Beside fp32 weights with fp32 states: the first loss is the same, and 8-bit states are all that differs after."""
    train, dataset = (train_sft, sft_set) if method == "sft" else (train_kto, kto_set)
    settings = replace(SFT, method=method)
    outputs = [
        train(wide_model, dataset, tmp_path / name, replace(settings, optimizer=name), progress=False)
        for name in ("adamw8bit-split", "adamw")
    ]
    ours, theirs = map(log_of, outputs)
    assert len(ours) == len(theirs) == 21
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=1e-5)
    assert theirs[-1]["loss"] < 0.9 * theirs[0]["loss"]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3)
    base = weights_of(wide_model)
    moves = [torch.cat([(w - base[name]).flatten() for name, w in weights_of(o).items()]).double() for o in outputs]
    assert float(moves[0] @ moves[1] / moves[0].norm() / moves[1].norm()) > 0.99


@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("method", ["sft", "kto"])
def test_packs_of_any_size_give_the_same_step(tokens, wide_model, method, forward):
    """To the rounding of the forward: in bf16 a pack's gradient of a matrix is rounded before it is added in fp32."""
    model, steps = split_model(wide_model, forward), [[0, 1, 2, 3, 4]]
    found = []
    for budget in (WHOLE, 100, 64):
        objective = sft_objective(tokens, forward)
        if method == "kto":
            objective = KtoObjective(tokens, make_groups(len(tokens), 4), KTO, Passes(forward, False, CPU))
            objective.set_reference(objective.reference_logprobs(model, steps, budget, progress=False) - 0.5)
        model.zero_grad()
        loss = float(objective.accumulate(model, steps[0], budget, torch.Tensor.backward))
        found.append((loss, gradients(model), objective.metrics()["packs"]))
    assert found[0][2] == 1 < found[1][2] < found[2][2]
    tolerance = {"fp32": 1e-6, "split": 5e-3, "bf16": 1e-2}[forward]
    for loss, gradient, _ in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=tolerance)
        assert (gradient - found[0][1]).norm() < tolerance * found[0][1].norm()


@pytest.mark.parametrize("forward", FORWARDS)
def test_checkpointed_layers_change_no_bit(tokens, wide_model, forward):
    runs = []
    for checkpointing in (False, True):
        model = split_model(wide_model, forward)
        loss = sft_objective(tokens, forward, checkpointing).accumulate(model, [0, 1], 100, torch.Tensor.backward)
        runs.append((loss, gradients(model)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("forward", FORWARDS)
def test_nothing_is_left_of_a_pack_that_the_memory_did_not_hold(tokens, wide_model, tmp_path, forward):
    """Half of a step's gradients are in place when the memory ends; the step in smaller packs is as if untried."""
    (tmp_path / "run.json").write_text("{}")
    model, fresh = split_model(wide_model, forward), split_model(wide_model, forward)
    objective, calls = sft_objective(tokens, forward), []

    def backward(loss):
        loss.backward()
        calls.append(sum(p.grad is not None for p in model.parameters()))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def undo():
        model.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in model.parameters())

    loss = PackBudget(tmp_path / "run.json", lambda: 200).run(
        step=0,
        longest=objective.longest([0, 1, 2]),
        compute=lambda budget: objective.accumulate(model, [0, 1, 2], budget, backward),
        undo=undo,
    )
    expected = objective.accumulate(fresh, [0, 1, 2], 100, torch.Tensor.backward)
    assert len(calls) > 4 and min(calls) == len(list(model.parameters()))
    assert torch.equal(loss, expected) and torch.equal(gradients(model), gradients(fresh))


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_head_is_what_the_forward_sees(wide_model, forward):
    model = split_model(wide_model, forward)
    weight = model.get_output_embeddings().weight
    low = masters_of(model).low[weight]
    low += 77
    head = seen_head(model, forward)
    hidden, multiplied = head_operands(torch.zeros(3, 64, dtype=torch.bfloat16), head, forward)
    assert hidden.dtype == multiplied.dtype == torch.float32
    if forward == "bf16":
        assert head.data_ptr() == weight.data_ptr()  # no copy where a device multiplies in bf16
        assert torch.equal(multiplied, weight.detach().float())
    else:
        assert torch.equal(multiplied, merge(weight, low)) and not torch.equal(multiplied, weight.detach().float())


class Matrices(TorchDispatchMode):
    """Notes the memory of every new fp32 matrix of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.found = shape, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == self.shape and tensor.dtype == torch.float32:
                self.found[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that none takes another's place
        return result


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_pack_makes_one_matrix_of_the_vocabularys_size(tokens, wide_model, forward):
    """What the head multiplies by; its gradient and the embedding's go into the one buffer of the step."""
    model, objective = split_model(wide_model, forward), sft_objective(tokens, forward)
    objective.accumulate(model, [0], WHOLE, torch.Tensor.backward)
    gradient = model.get_input_embeddings().weight.grad
    before = gradient.clone()
    with Matrices(gradient.shape) as made:
        objective.accumulate(model, [1], WHOLE, torch.Tensor.backward)
    assert objective.metrics()["packs"] == 1 and not torch.equal(gradient, before)
    assert model.get_input_embeddings().weight.grad is gradient
    assert len(made.found.keys() - {gradient.untyped_storage().data_ptr()}) == 1


# Runs at the rates that this is for.


@pytest.mark.parametrize("forward", FORWARDS)
def test_kto_at_1e_8_starts_at_zero_and_says_what_the_forward_saw(wide_model, kto_set, tmp_path, capsys, forward):
    settings = replace(KTO, learning_rate=1e-8, epochs=2, forward=forward)
    output = train_kto(wide_model, kto_set, tmp_path / "own", settings, progress=False)
    line = capsys.readouterr().err.splitlines()[-1]
    copy = shutil.copytree(wide_model, tmp_path / "copy")
    held = train_kto(wide_model, kto_set, tmp_path / "held", settings, reference=copy, progress=False)
    for log in map(log_of, (output, held)):
        # The same kernels, precision and batches: the policy is its reference to the bit, in another object as well.
        assert (log[0]["reward_desirable"], log[0]["reward_undesirable"], log[0]["z0"]) == (0.0, 0.0, 0.0)
    assert log_of(output) == log_of(held)

    card = json.loads((output / "training.json").read_text())
    seen, kept = card["forward_sees"], card["bfloat16_keeps"]
    assert f"the {forward} forward saw {seen['weights']:.2%} of the moved weights" in line
    assert f"{seen['norm']:.2%} of the update's norm" in line and "bfloat16 would keep" in line
    assert kept == update_survival(wide_model, output, "bfloat16")._asdict()
    assert kept["weights"] < 0.01 and kept["norm"] < 0.05
    if forward == "bf16":  # all of the norms' update, and of the others' what bf16 keeps
        counter = SurvivalCounter(torch.bfloat16)
        whole = SurvivalCounter(torch.float32)
        before, after = weights_of(wide_model), weights_of(output)
        for name in before:
            (whole if "norm" in name else counter).add(before[name], after[name])
        moved = {name: int((before[name] != after[name]).sum()) for name in before}
        norms = sum(count for name, count in moved.items() if "norm" in name)
        expected = (norms + counter.result().weights * (sum(moved.values()) - norms)) / sum(moved.values())
        assert norms and whole.result() == (1.0, pytest.approx(1.0))
        assert seen["weights"] == pytest.approx(expected) and seen["weights"] > kept["weights"]
    elif forward == "split":
        assert seen["weights"] == 1.0 and seen["norm"] == pytest.approx(1.0, abs=1e-3)
    else:
        assert seen == {"weights": 1.0, "norm": pytest.approx(1.0, rel=1e-12)}


def test_a_first_step_of_1e_8_is_in_the_saved_model(wide_model, sft_set, tmp_path, monkeypatch):
    """Every weight with a gradient moves, in fp32 or in the bits below it; the file holds the step that Adam makes."""
    made, original = [], run.make_optimizer
    monkeypatch.setattr(run, "make_optimizer", lambda *told: made.append((told[0], original(*told))) or made[-1][1])
    base = shutil.copytree(wide_model, tmp_path / "base")
    tensors = {name: tensor.clone() for name, tensor in weights_of(base).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][5] = 0.3125  # too coarse for this step
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    settings = replace(SFT, learning_rate=1e-8, epochs=1, accumulation=6, warmup_ratio=0.0, clip=0.0)
    output = train_sft(base, sft_set, tmp_path / "S1", settings, progress=False)
    assert len(log_of(output)) == 1
    after, (model, optimizer) = weights_of(output), made[0]
    masters = masters_of(model)
    assert 0 < optimizer.compensated < 0.02 * sum(weights.numel() for weights in masters.low)

    whole = load_model(base)
    tokens = load_tokens(sft_set, load_tokenizer(base), settings)
    sft_objective(tokens, "fp32").accumulate(whole, range(6), 2048, torch.Tensor.backward)
    driven = moved = coarse = 0
    product = square = 0.0
    for (name, parameter), before in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(after[name], masters.merged(parameter))  # the saved model is fp32, merged
        strong = before.grad.abs() > 100 * EPS
        below = _below_fp32(optimizer.state[parameter], before)
        differs = (after[name] != before.detach()) | (below != 0)
        driven, moved = driven + int(strong.sum()), moved + int((strong & differs).sum())
        coarse += int((strong & (after[name] == before.detach()) & differs).sum())
        gradient = before.grad.double()
        step = -1e-8 * gradient / (gradient.abs() + EPS)
        product += float((step * (after[name].double() - before.detach().double())).sum())
        square += float(step.square().sum())
    assert driven > 10_000 and moved >= 0.99 * driven
    assert coarse >= 64  # moved in the bits below fp32 alone
    assert product / square >= 0.99
    kept = update_survival(base, output, "bfloat16")
    assert kept.weights < 0.01 and kept.norm < 0.05


def _below_fp32(state, parameter):
    """What the optimizer keeps of each weight that fp32 does not hold, 0 where it keeps nothing."""
    if "residual" in state:
        return state["residual"]
    if not len(state.get("slots", ())):
        return torch.zeros_like(parameter)
    blocks = torch.zeros(len(state["slots"]), 256, dtype=torch.int16)
    compensated = state["slots"] >= 0
    blocks[compensated] = state["lowest"][state["slots"][compensated].long()]
    return blocks.flatten()[: parameter.numel()].view(parameter.shape)


@pytest.fixture(scope="module")
def miniature_set(tmp_path_factory):
    """96 of the miniature's questions, every third with a wrong reply."""
    rng, rows = Random(0), {"prompt": [], "completion": [], "label": []}
    for number in range(96):
        language = ("en", "zh")[number % 2]
        item, other = (draw_item(rng.choice(list(SKILLS)), language, rng) for _ in range(2))
        right = number % 3 != 2
        reply = item.answer if right else wrong_reply(item, rng, other)
        rows["prompt"].append([{"role": "user", "content": item.text}])
        rows["completion"].append([{"role": "assistant", "content": reply}])
        rows["label"].append(right)
    types = {"prompt": pa.list_(MESSAGE), "completion": pa.list_(MESSAGE), "label": pa.bool_()}
    path = tmp_path_factory.mktemp("miniature") / "kto.parquet"
    pq.write_table(pa.table({name: pa.array(values, types[name]) for name, values in rows.items()}), path)
    return path


@pytest.mark.slow
def test_what_each_forward_sees_of_kto_on_the_miniature(miniature_set, tmp_path, capsys):
    """Six steps at 1e-8 of the miniature's own base model, printed; the masters learn the same with every forward."""
    base, updates, seen = Path(miniature.__file__).parent / "models" / "base", {}, {}
    before = {name: tensor.float() for name, tensor in weights_of(base).items()}
    for forward in FORWARDS:
        settings = replace(KTO, learning_rate=1e-8, epochs=2, accumulation=8, forward=forward)
        output = train_kto(base, miniature_set, tmp_path / forward, settings, progress=False)
        after = weights_of(output)
        updates[forward] = torch.cat([(after[name] - before[name]).flatten() for name in before]).double()
        seen[forward] = json.loads((output / "training.json").read_text())["forward_sees"]
    with capsys.disabled():
        print(*(f"\n{forward}: {shares}" for forward, shares in seen.items()))
    assert seen["bf16"]["weights"] < 0.01 and seen["bf16"]["norm"] < 0.01
    for forward in ("split", "fp32"):
        assert seen[forward]["weights"] > 0.999 and seen[forward]["norm"] == pytest.approx(1.0, abs=1e-3)
        cosine = updates[forward] @ updates["bf16"] / updates[forward].norm() / updates["bf16"].norm()
        assert float(cosine) > 0.5


def test_autocast_rounds_what_is_multiplied_and_nothing_else(wide_model):
    """Nudged by less than bf16 can tell, a product's weight and bias change no output; all else does."""
    model = load_model(wide_model)
    rounded, ids = multiplied(model), torch.arange(3, 40)[None]

    def output():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    checked = set()
    for name, parameter in model.named_parameters():
        if parameter is model.get_output_embeddings().weight:
            continue
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_((parameter + (0.3 if parameter.ndim == 1 else 0.0)).bfloat16())  # biases begin as 0
            before = output()
            parameter.mul_(1 + 2**-12)
            after = output()
            parameter.copy_(kept)
        assert torch.equal(before, after) is (parameter in rounded), name
        checked.add((parameter in rounded, parameter.ndim))
    assert checked == {(True, 2), (True, 1), (False, 1)}  # weights, biases, norms
