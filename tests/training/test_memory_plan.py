"""The plan of memory against counts of its own: parameters by arithmetic, a real step by torch's profiler."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import slmfast
from slmfast.errors import UserError
from slmfast.kernels import head_op
from slmfast.scoring import attention
from slmfast.sizes import GIB, parse_bytes
from slmfast.training import fake_step, memory
from slmfast.training.data import TokenSet
from slmfast.training.fake_step import DEVICE, FakeRun, full_packs
from slmfast.training.kto import KtoObjective
from slmfast.training.live_bytes import NEW, LiveBytes
from slmfast.training.memory import RESERVE, largest_fitting, pack_sizes
from slmfast.training.passes import Passes
from slmfast.training.peer_memory import trl_peak
from slmfast.training.settings import TrainSettings

KTO = TrainSettings(method="kto", learning_rate=1e-8)
OPTIMIZERS = {"adamw": "fp32", "adamw8bit": "fp32", "adamw8bit-split": "bf16"}


def small_config(tied: bool = True, **changes) -> Qwen2Config:
    """Neither a toy nor slow: activations of a pack of 512 tokens take more than the weights."""
    told = {
        "vocab_size": 3000,
        "hidden_size": 192,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }
    return Qwen2Config(**told | changes)


@pytest.fixture(scope="module")
def config_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    small_config().save_pretrained(folder)
    return folder


def expected_static(model: torch.nn.Module, optimizer: str) -> dict[str, int]:
    """Bytes of weights, gradients and states, from the parameters' sizes alone."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    states = 2 * 256 * 4 if optimizer == "adamw8bit" else 0  # bitsandbytes' two tables of codes
    for count in sizes.values():
        small = optimizer == "adamw" or count < 4096
        states += 8 * count if small else 2 * count + 2 * 4 * -(-count // 256)
    return {
        "weights": 4 * sum(sizes.values()) + buffers,
        "gradients": 4 * sum(sizes.values()),
        "optimizer states": states,
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_static_rows_are_those_of_the_parameters(optimizer, tied):
    config = small_config(tied)
    settings = replace(KTO, optimizer=optimizer, forward=OPTIMIZERS[optimizer])
    run = FakeRun(config, settings, {})
    expected = expected_static(Qwen2ForCausalLM(config), optimizer)
    for peak in (run.step_peak, run.pass_peak(512, True, 256)):
        assert {name: peak[name] for name in expected} == expected


def test_split_masters_of_half_a_billion_weights_take_five_gigabytes():
    """Qwen2-0.5B's shape, 494,032,768 weights: 2 + 2 + 4 + 1 + 1 bytes each and 8 for 256; the target is 5.0 GB."""
    config = small_config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    run = FakeRun(config, replace(KTO, optimizer="adamw8bit-split", forward="bf16"), {})
    assert sum(parameter.numel() for parameter in run.model.parameters()) == 494_032_768
    static = sum(size for name, size in run.step_peak.items() if name not in ("activations", "temporaries"))
    assert 494_032_768 * 10 < static < 5.0e9


@pytest.mark.slow
def test_kto_of_one_and_a_half_billion_weights_fits_24_gib():
    """Qwen2-1.5B's shape, every parameter trained, sequences of 2,048 tokens; TRL's plan is over twice as large."""
    config = small_config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    )
    settings = replace(KTO, optimizer="adamw8bit-split", forward="bf16", pack_tokens=2048)
    run = FakeRun(config, settings, {})
    assert sum(parameter.numel() for parameter in run.model.parameters()) == 1_543_714_304
    peaks = [sum(run.pass_peak(2048, checkpointing, 2048).values()) for checkpointing in (True, False)]
    assert sum(run.step_peak.values()) < peaks[0] < peaks[1] < 24 * GIB - RESERVE
    assert peaks[0] < 0.5 * sum(trl_peak(config, "kto", 4, 2048).values())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_is_what_a_real_step_allocates(checkpointing, monkeypatch):
    """torch's profiler sees every allocation of a step, also those inside operators. CUDA's path, run on a CPU."""
    config, pack, longest = small_config(), 512, 128
    planned = FakeRun(config, KTO, {}).pass_peak(pack, checkpointing, longest)
    for module in ("slmfast.scoring.attention", "slmfast.kernels.cpu_products", "slmfast.kernels.head_op"):
        monkeypatch.setattr(f"{module}.like_cuda", lambda tensor: True)
    monkeypatch.setattr(head_op, "_workspace_bytes", lambda *_: 0)  # the CPU's head has tiles of its own in its place
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = full_packs("kto", pack, longest, config.vocab_size)
    objective = KtoObjective(tokens, [range(len(tokens))], KTO, Passes("fp32", checkpointing, DEVICE))
    objective.set_reference(torch.zeros(2, len(tokens), dtype=torch.float64))
    step = lambda: objective.accumulate(model, [0], pack, lambda loss: loss.backward())  # noqa: E731
    step()  # what is asked of a model once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert len(changes) > 1000
    real = max(itertools.accumulate(changes))
    ours = planned["activations"] + planned["temporaries"]
    assert ours == pytest.approx(real, rel=0.1)


def test_rows_add_up_and_peaks_rise_with_the_packs():
    run = FakeRun(small_config(), replace(KTO, forward="bf16"), {})
    for checkpointing in (False, True):
        peaks = [sum(run.pass_peak(tokens, checkpointing, 256).values()) for tokens in (256, 512, 1024, 2048)]
        assert peaks == sorted(set(peaks))
    assert sum(run.pass_peak(1024, True, 256).values()) < sum(run.pass_peak(1024, False, 256).values())


def test_attention_of_half_precision_keeps_no_scores():
    """Four times the length takes four times the memory, and not sixteen, in a pack of one sequence."""
    run = FakeRun(small_config(), replace(KTO, forward="bf16"), {})
    short, long = (run.pass_peak(length, False, length)["activations"] for length in (1024, 4096))
    copies = 2 * sum(p.numel() for p in run.model.parameters() if p.ndim == 2)  # of the weights, for autocast
    assert (long - copies) / (short - copies) == pytest.approx(4, rel=0.02)


def test_a_plan_chooses_the_largest_packs_that_fit(config_folder):
    plan = slmfast.plan_memory(config_folder, budget=2 * GIB, max_length=256)
    assert plan.fits and plan.peak_bytes == sum(size for _, size in plan.rows) <= plan.usable_bytes == GIB // 2
    told = plan.settings
    larger = replace(told, pack_tokens=2 * told.pack_tokens)
    again = slmfast.plan_memory(config_folder, budget=2 * GIB, settings=larger, longest=256, seek_remedy=False)
    assert told.checkpointing == "off" and not again.fits
    same = slmfast.plan_memory(config_folder, budget=2 * GIB, settings=told, longest=256)
    assert same.rows == plan.rows and same.settings == told


def test_a_plan_checkpoints_where_that_alone_fits(config_folder):
    fixed = {"max_length": 2048, "pack_tokens": 2048}
    whole = slmfast.plan_memory(config_folder, budget="24GiB", **fixed, checkpointing="off")
    plan = slmfast.plan_memory(config_folder, budget=RESERVE + whole.peak_bytes - 1, **fixed)
    assert plan.fits and plan.settings.checkpointing == "on"
    kept = slmfast.plan_memory(config_folder, budget=plan.budget, **fixed, checkpointing="off")
    assert not kept.fits and kept.remedy == {"checkpointing": "auto"}


@pytest.mark.slow
def test_what_would_make_it_fit_does(config_folder):
    lighter = slmfast.plan_memory(
        config_folder, max_length=256, pack_tokens=256, checkpointing="on", optimizer="adamw8bit"
    )
    plan = slmfast.plan_memory(config_folder, budget=RESERVE + lighter.peak_bytes, max_length=256, pack_tokens=256)
    assert not plan.fits and plan.remedy == {"pack_tokens": None, "optimizer": "adamw8bit"}
    mended = slmfast.plan_memory(config_folder, budget=plan.budget, max_length=256, **plan.remedy)
    assert mended.fits and mended.remedy is None
    hopeless = slmfast.plan_memory(config_folder, budget="1GiB")
    assert (hopeless.fits, hopeless.remedy, hopeless.usable_bytes) == (False, None, 0)


def replies_to_one_prompt(method, pack_tokens, longest, vocabulary):
    """31 short replies to a prompt that takes most of the window: nearly as many keys a token as a pack may have."""
    short = longest // 32
    prompt, replies = np.full(longest - short, 7, np.int32), [np.full(short, i, np.int32) for i in range(31)]
    return TokenSet([prompt] * 31, replies, np.arange(31) % 2 == 0 if method == "kto" else None, 0)


@pytest.mark.parametrize("forward", ["fp32", "split", "bf16"])
def test_a_plan_leaves_room_for_short_replies_to_long_prompts(monkeypatch, forward):
    config = small_config(vocab_size=300, intermediate_size=256, num_key_value_heads=6, num_hidden_layers=3)
    run = FakeRun(config, replace(KTO, optimizer="adamw8bit-split", forward=forward), {})
    planned = sum(size for _, size in memory._peak(run, False, 512, 1024))
    seen = run.pass_peak(1024, False, 512)
    monkeypatch.setattr(fake_step, "full_packs", replies_to_one_prompt)
    real = sum(run.pass_peak(1024, False, 512).values())
    assert planned >= real
    assert forward == "split" or sum(seen.values()) < real  # which long sequences alone would not take


@pytest.mark.parametrize("bend", [0, 3000, 100_000])
def test_the_largest_size_is_found_whatever_the_room(bend):
    sizes = pack_sizes(500)
    assert sizes[0] == 256 and sizes[-1] == 32768
    line = lambda tokens: 1_000_000 + 90 * tokens + bend * min(tokens, 4096) // 256  # noqa: E731
    for usable in (0, line(256) - 1, *(line(size) + more for size in sizes for more in (0, 1, 5000))):
        expected = max((size for size in sizes if line(size) <= usable), default=None)
        assert largest_fitting(sizes, line, usable) == expected


def test_compensated_weights_are_counted():
    model = Qwen2ForCausalLM(small_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
        up = model.model.layers[0].mlp.up_proj.weight
        up[:3, 0] = 0.5  # rows of 192: three blocks of 256, the first of which holds two of these
    fixed = {"max_length": 256, "pack_tokens": 256, "checkpointing": "on"}

    def states(optimizer: str, warmup_steps: int = 1) -> int:
        told = {"optimizer": optimizer, "forward": OPTIMIZERS[optimizer], "warmup_steps": warmup_steps}
        return dict(slmfast.plan_memory(model, **told, **fixed).rows)["optimizer states"]

    assert states("adamw") - expected_static(model, "adamw")["optimizer states"] == 4 * up.numel()
    more = states("adamw8bit-split") - expected_static(model, "adamw8bit-split")["optimizer states"]
    assert more == 4 * up.numel() // 256 + 2 * 2 * 256
    everything = sum(parameter.numel() for parameter in model.parameters() if parameter.abs().max() > 0)
    assert states("adamw", 10**9) - expected_static(model, "adamw")["optimizer states"] == 4 * everything


def test_frozen_parameters_have_no_gradients():
    model = Qwen2ForCausalLM(small_config())
    model.model.embed_tokens.weight.requires_grad_(False)
    rows = dict(slmfast.plan_memory(model, max_length=256, method="sft").rows)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert rows["gradients"] == 4 * trained < rows["weights"] - 4 * 3000 * 192 + 1000


def test_shared_heads_attend_the_same_on_the_path_of_cuda(monkeypatch):
    model = Qwen2ForCausalLM(small_config()).eval()
    tokens = full_packs("kto", 64, 16, 3000)
    pairs = list(zip(tokens.prompts, tokens.completions, strict=True))
    passes = Passes("fp32", False, DEVICE)
    expected = passes.same_without_gradient(model, pairs, 64)
    monkeypatch.setattr(attention, "like_cuda", lambda tensor: True)
    torch.testing.assert_close(passes.same_without_gradient(model, pairs, 64), expected)


def test_a_model_that_asks_for_values_is_named(monkeypatch):
    def looks(config):
        model = make(config)
        model.register_forward_pre_hook(lambda *_: None)
        model.get_decoder().register_forward_pre_hook(lambda *_: float(torch.ones(1) + 1))
        return model

    make = fake_step.fake_model
    monkeypatch.setattr(fake_step, "fake_model", looks)
    monkeypatch.setattr(memory, "fake_model", looks)
    with pytest.raises(UserError, match=r"can't be planned.*leave budget out"):
        slmfast.plan_memory(Qwen2ForCausalLM(small_config()))


def test_live_bytes_counts_storages_once_until_they_go():
    with LiveBytes() as live:
        first = torch.zeros(100)
        view = first[10:].view(9, 10)
        second = view + 1
        assert live.live == {NEW: 400 + 360}
        live.add([first], "kept")
        del first, second
        assert live.live == {NEW: 0, "kept": 400} and live.peak_bytes == 760
        live.reset_peak()
        third = torch.zeros(10)
        live.rename_new("late")
        assert live.peak == {"kept": 400, NEW: 0, "late": 40}
    assert third.numel() == 10 and view.shape == (9, 10)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("24 gb", 24 * 10**9),
        (5 << 20, 5 << 20),
        ("1.5MiB", 3 << 19),
        ("7000000", 7 * 10**6),
        ("8B", 8),
    ],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24 apples", "-1GiB", "0GiB", "GiB", 0, -3, None, True, 1.5, "1e9", 24, "24"])
def test_what_is_no_amount_of_memory_is_refused(text):
    with pytest.raises(UserError, match=r"budget is .*: give an amount of memory such as 24GiB"):
        parse_bytes(text)
