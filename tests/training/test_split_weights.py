"""fp32 weights in two halves: nothing is lost, and models compute and learn with them as with whole ones."""

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slmfast.errors import UserError
from slmfast.training import checkpoint
from slmfast.training.fake_step import fake_model, split_names, values_refused
from slmfast.training.optimizer import AdamW, make_optimizer
from slmfast.training.settings import TrainSettings
from slmfast.training.split_adamw import SplitAdamW8bit
from slmfast.training.split_weights import SplitWeights, fp32_grad, merge, split

SETTINGS = TrainSettings(method="sft", learning_rate=1e-3, optimizer="adamw8bit-split")


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def check_halves(weights):
    """Merged they are the weights, and high is as near to them as torch's own rounding."""
    high, low = split(weights)
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert same_bits(merge(high, low), weights)
    torchs = weights.bfloat16()
    differ = high.view(torch.int16) != torchs.view(torch.int16)
    # only a number halfway between two goes elsewhere: away from zero, where torch goes to the even one
    assert (weights[differ].view(torch.int32) & 0xFFFF == 0x8000).all()
    assert (high[differ].float().abs() > weights[differ].abs()).all()
    return int(differ.sum())


@pytest.mark.parametrize("exponent", [0, 1, 100, 127, 254])  # subnormal, smallest normal, ..., largest
@pytest.mark.parametrize("sign", [0, 1])
def test_every_number_of_an_exponent_comes_back(exponent, sign):
    bits = torch.arange(1 << 23, dtype=torch.int32) | (exponent << 23)
    ties = check_halves((bits | (-(2**31) if sign else 0)).view(torch.float32))
    assert ties == 1 << 6  # of 2^7 bf16 numbers the even ones


def test_ten_million_numbers_come_back():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (10_000_000,), generator=generator).to(torch.int32)
    weights = bits.view(torch.float32)
    check_halves(weights[weights.isfinite()])


def test_what_is_on_the_bf16_grid_has_no_low_half():
    weights = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    high, low = split(weights)
    assert torch.equal(high.float(), weights) and not low.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bad):
    weights = torch.zeros(5000)
    weights[17] = bad
    with pytest.raises(UserError, match="NaN or infinite"):
        split(weights)


@pytest.fixture
def tiny():
    """A model whose matrices are large enough to be split, tied, and a batch for it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            bits = parameter.view(torch.int32)
            bits[(bits & 0xFFFF) == 0x8000] += 1  # halfway between two of bf16, where torch rounds otherwise
    return model, torch.randint(300, (3, 11))


def loss_of(model, ids, autocast, masters=None):
    """A loss of the hidden states under an fp32 head, as training computes it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    weight = model.get_output_embeddings().weight
    logits = hidden.float() @ (masters.full(weight) if masters else weight).T
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_large_matrices_are_split_and_stay_tied(tiny):
    model, _ = tiny
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    masters = SplitWeights(model)
    split_names = {name for name, parameter in model.named_parameters() if parameter in masters.low}
    assert split_names == {name for name, weights in before.items() if weights.numel() >= 4096}
    assert "model.embed_tokens.weight" in split_names and len(split_names) == 15
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name in split_names else torch.float32)
    merged = dict(masters.fp32_parameters(model))
    assert merged.keys() == before.keys()
    assert all(same_bits(merged[name], before[name]) for name in before)


@pytest.mark.parametrize("forward", ["bf16", "fp32", "split"])
def test_computes_what_whole_weights_compute(tiny, forward):
    """bf16: what fp32 weights do under autocast, in all bits; fp32: what they do; split: but for bf16 activations."""
    model, ids = tiny
    whole = copy.deepcopy(model)
    masters = SplitWeights(model, forward)
    assert len(masters.low) == 15
    reference = loss_of(whole, ids, autocast=forward == "bf16")
    loss = loss_of(model, ids, autocast=forward == "bf16", masters=masters)
    reference.backward()
    loss.backward()
    tolerance = {"bf16": 1e-6, "fp32": 1e-6, "split": 2e-3}[forward]
    assert abs(float((loss - reference).detach())) <= tolerance * float(reference.detach())
    if forward == "bf16":
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            hidden = [m.base_model(input_ids=ids, use_cache=False).last_hidden_state for m in (model, whole)]
        assert torch.equal(*hidden)
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        error = float((mine.grad - theirs.grad).norm() / theirs.grad.norm())
        assert error <= {"bf16": 1e-5, "fp32": 1e-5, "split": 2e-2}[forward], name


def test_what_each_forward_sees_of_a_small_update(tiny):
    """An update of 1e-5 of each weight: split and fp32 see it all, bf16 does not."""
    model, _ = tiny
    seen = {}
    for forward in ("bf16", "split", "fp32"):
        outputs = []
        for update in (0.0, 1e-5):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for parameter in changed.parameters():
                    parameter.mul_(1 + update) if parameter.numel() >= 4096 else None
            SplitWeights(changed, forward)
            linear = changed.model.layers[0].mlp.up_proj
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
            with torch.autocast("cpu", torch.bfloat16, enabled=forward == "bf16"), torch.no_grad():
                outputs.append(linear(x).double())
        moved, true = outputs[1] - outputs[0], 1e-5 * outputs[1]
        seen[forward] = float((moved * true).sum() / true.square().sum())
    assert seen["fp32"] == pytest.approx(1, abs=0.05) and seen["split"] == pytest.approx(1, abs=0.05)
    assert abs(seen["bf16"] - 1) > 0.2


def test_packs_accumulate_in_fp32(tiny):
    """Gradients of many packs add up to that of all, closer than sums in bf16 would be."""
    model, ids = tiny
    whole = copy.deepcopy(model)
    masters = SplitWeights(model, "fp32")
    for _ in range(10):
        loss_of(model, ids, autocast=False, masters=masters).backward()
    loss_of(whole, ids, autocast=False).backward()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert float((mine.grad / 10 - theirs.grad).norm() / theirs.grad.norm()) < 1e-5


def test_a_fused_backward_adds_in_place(tiny):
    model, ids = tiny
    masters = SplitWeights(model, "fp32")
    head = model.get_output_embeddings().weight
    buffer = fp32_grad(head)
    assert buffer.dtype == torch.float32 and not buffer.any()
    model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    assert head.grad is buffer and buffer[ids.flatten()].any()
    before = buffer.clone()
    fp32_grad(head).add_(1.0)
    assert torch.equal(head.grad, before + 1) and head in masters.low


def test_clipping_is_that_of_whole_weights(tiny):
    model, ids = tiny
    whole = copy.deepcopy(model)
    masters = SplitWeights(model, "fp32")
    loss_of(model, ids, autocast=False, masters=masters).backward()
    loss_of(whole, ids, autocast=False).backward()
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1) for m in (model, whole)]
    assert torch.allclose(*norms, rtol=1e-5)
    left = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert float(left) == pytest.approx(0.1, rel=1e-4)


def test_learns_as_with_whole_weights(tiny):
    """Twelve steps beside fp32 AdamW on the same model: the 8-bit states are all that differs."""
    model, ids = tiny
    whole = copy.deepcopy(model)
    masters = SplitWeights(model, "fp32")
    optimizers = (make_optimizer(model, SETTINGS, 1, masters), AdamW(list(whole.parameters()), lr=1e-3))
    losses = []
    for _ in range(12):
        pair = (loss_of(model, ids, False, masters), loss_of(whole, ids, False))
        for loss, optimizer in zip(pair, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append([float(loss) for loss in pair])
    assert losses[-1][0] < 0.9 * losses[0][0]
    assert all(abs(mine - theirs) < 0.02 * theirs for mine, theirs in losses)


def test_all_matrices_have_8_bit_states_the_embedding_too(tiny):
    model, ids = tiny
    masters = SplitWeights(model)
    optimizer = make_optimizer(model, SETTINGS, 1, masters)
    loss_of(model, ids, autocast=True, masters=masters).backward()
    optimizer.step()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        wanted = torch.uint8 if parameter.numel() >= 4096 else torch.float32
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == wanted
    assert optimizer.state[model.get_input_embeddings().weight]["exp_avg"].dtype == torch.uint8


def test_bytes_a_weight():
    """2 + 2 for the weight, 4 for the gradient, 1 + 1 for the states, 8 for 256 weights; 4.96 GB for 0.494 billion."""
    layer = torch.nn.Linear(512, 1024, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    masters = SplitWeights(layer, "fp32")
    optimizer = make_optimizer(layer, SETTINGS, 1, masters)
    layer(torch.randn(3, 512)).sum().backward()
    optimizer.step()
    weight = layer.weight
    held = [weight, weight.grad, *(x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor))]
    per_weight = sum(tensor.numel() * tensor.element_size() for tensor in held) / weight.numel()
    assert per_weight == 2 + 2 + 4 + 1 + 1 + 8 / 256 and optimizer.compensated == 0
    assert 494_032_768 * per_weight < 5.0e9


@pytest.mark.parametrize("forward", ["bf16", "split", "fp32"])
def test_a_plan_of_memory_can_take_a_step(forward):
    """With fake tensors, which have no values: all of a step runs, and the states have their real sizes."""
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Embedding(50_000, 64), torch.nn.Linear(64, 300))
        masters = SplitWeights(model, forward)
        optimizer = make_optimizer(model, SETTINGS, 1, masters)
        with torch.autocast("cpu", torch.bfloat16, enabled=forward == "bf16"):
            output = model(torch.randint(50_000, (3, 7)))
        output.float().sum().backward()
        optimizer.step()
    weight = model[0].weight
    held = [weight, weight.grad, *(x for x in optimizer.state[weight].values() if isinstance(x, torch.Tensor))]
    assert sum(x.numel() * x.element_size() for x in held) == 50_000 * 64 * 10 + 8 * 12_500


def coarse_layer():
    """A layer of which one block in eight is too coarse for steps of 1e-8, and one bias is too."""
    layer = torch.nn.Linear(256, 64)
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        layer.weight[::8, 0] = 0.3
        layer.bias.fill_(2.0)
    return layer


def test_only_coarse_blocks_are_compensated():
    layer = coarse_layer()
    masters = SplitWeights(layer)
    settings = TrainSettings(method="sft", learning_rate=1e-8, optimizer="adamw8bit-split")
    optimizer = make_optimizer(layer, settings, 1, masters)
    assert optimizer.compensated == 8 * 256
    assert (optimizer.state[layer.weight]["slots"] >= 0).nonzero().flatten().tolist() == list(range(0, 64, 8))


@pytest.mark.parametrize("resumed_at", [1, 4])
def test_goes_on_bit_for_bit_from_a_checkpoint(tmp_path, resumed_at):
    """Saved by one process and loaded into fresh objects by another, at any step: the same weights and states."""
    settings = TrainSettings(method="sft", learning_rate=1e-8, optimizer="adamw8bit-split")

    def parts():
        layer = coarse_layer()
        masters = SplitWeights(layer, "fp32")
        optimizer = make_optimizer(layer, settings, 1, masters)
        return layer, masters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def take(parts, steps):
        layer, _, optimizer, scheduler = parts
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in layer.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            scheduler.step()

    through, first, second = parts(), parts(), parts()
    take(through, range(6))
    take(first, range(resumed_at))
    checkpoint.save(tmp_path / "checkpoint-1", first[0], first[2], first[3], lambda path: Path(path).write_text("{}"))
    checkpoint.load_weights(tmp_path / "checkpoint-1", second[0])
    checkpoint.load_optimizer(tmp_path / "checkpoint-1", second[2], second[3])
    take(second, range(resumed_at, 6))
    for (name, mine), (_, other) in zip(
        through[1].fp32_parameters(through[0]), second[1].fp32_parameters(second[0]), strict=True
    ):
        assert same_bits(mine, other), name
    for mine, other in zip(through[2].state.values(), second[2].state.values(), strict=True):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key
    assert any("residual" in state for state in second[2].state.values())
    assert second[2].state[second[0].weight]["low"] is second[1].low[second[0].weight]


def test_accelerate_takes_both(tiny):
    """It loads the optimizer's own state back into it when it prepares one, and clips."""
    from accelerate import Accelerator

    model, ids = tiny
    masters = SplitWeights(model, "fp32")
    optimizer = make_optimizer(model, SETTINGS, 1, masters)
    before = dict(masters.fp32_parameters(model))
    accelerator = Accelerator(cpu=True)
    prepared, stepping = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(loss_of(prepared, ids, False, masters))
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        stepping.step()
        stepping.zero_grad()
    head = model.get_output_embeddings().weight
    assert optimizer.state[head]["low"] is masters.low[head] and optimizer.state[head]["step"] == 2
    assert optimizer.state[head]["exp_avg"].dtype == torch.uint8 and head.grad is None
    # Adam's first two steps move whatever has a gradient by about the rate each
    moved = (masters.merged(head) - before["model.embed_tokens.weight"]).abs()
    assert 1e-3 < float(moved.max()) < 2.5e-3


def test_split_weights_and_their_optimizer_belong_together(tiny):
    model, _ = tiny
    with pytest.raises(UserError, match="adamw8bit-split"):
        make_optimizer(model, SETTINGS, 1)
    masters = SplitWeights(model)
    with pytest.raises(UserError, match="adamw8bit-split"):
        make_optimizer(model, TrainSettings(method="sft", learning_rate=1e-3), 1, masters)
    assert isinstance(make_optimizer(model, SETTINGS, 1, masters), SplitAdamW8bit)
    with pytest.raises(UserError, match="forward is 'half'"):
        SplitWeights(model, "half")


@pytest.mark.parametrize("told", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_that_does_more_than_look_up_is_refused(told):
    with pytest.raises(UserError, match="take another optimizer"):
        SplitWeights(torch.nn.Embedding(100, 64, **told))


def gemma(tied):
    """A tiny Gemma3, whose embedding is a subclass that scales its rows."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads, tie_word_embeddings=tied, pad_token_id=0)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_layer_of_another_kind_keeps_its_weight_and_its_forward(tied):
    """Also where a plain head shares that weight: the gradient is that of whole weights, and the plan knows."""
    model, ids = gemma(tied), torch.randint(1, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    whole = copy.deepcopy(model)
    masters = SplitWeights(model, "fp32")
    loss_of(model, ids, False, masters).backward()
    loss_of(whole, ids, False).backward()
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert float((mine.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-4, name
    kept = {name for name, parameter in model.named_parameters() if parameter in masters.low}
    assert ("lm_head.weight" in kept) is not tied
    assert "model.embed_tokens.weight" not in kept and len(kept) == (10 if tied else 11)
    with values_refused(), FakeTensorMode():
        assert split_names(fake_model(whole.config), SETTINGS) == kept


@pytest.mark.parametrize("forward", ["bf16", "split", "fp32"])
def test_a_split_model_goes_as_soon_as_nobody_holds_it(forward):
    gc.collect()
    gc.disable()
    try:
        model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64))
        SplitWeights(model, forward)
        held = weakref.ref(model[0].weight), weakref.ref(model[1].weight)
        del model
        assert [weight() for weight in held] == [None, None]
    finally:
        gc.enable()
