"""What becomes of a batch that the memory does not hold, and how the tokens of a batch are chosen."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import slmfast
from slmfast import UserError
from slmfast.scoring import budget as budgets
from slmfast.scoring import forward
from slmfast.scoring.forward import continuation_logprobs
from slmfast.scoring.packing import KEYS_A_TOKEN, Group, make_packs


@pytest.fixture
def groups():
    rng = np.random.default_rng(0)
    return [Group(rng.integers(0, 700, 10), [rng.integers(0, 700, n) for n in (1, 6, 9)]) for _ in range(12)]


@pytest.fixture
def limited(monkeypatch):
    """A function that gives the model memory for some tokens at a time, and the sizes of the batches that ran."""
    ran = []

    def limit(most, error):
        whole = forward._sums

        def short(model, weight, batch):
            if batch.tokens > most:
                raise error
            ran.append(batch.tokens)
            return whole(model, weight, batch)

        monkeypatch.setattr(forward, "_sums", short)
        return ran

    return limit


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("attention", ["sdpa", "none"])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(
    build_model, groups, limited, error, attention, monkeypatch
):
    model = build_model()
    if attention == "none":
        monkeypatch.setattr(forward, "why_not_packed", lambda model: "it is told so")
    expected = continuation_logprobs(model, groups)
    halved = []
    ran = limited(60, error)
    got = continuation_logprobs(model, groups, batch_tokens=400, on_halved=halved.append)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert halved and halved[-1] <= 60 and sorted(halved, reverse=True) == halved
    assert max(ran) <= 60 < sum(ran)


def test_a_sequence_that_does_not_fit_is_named(model, groups, limited):
    limited(12, ERRORS[0])
    with pytest.raises(UserError, match=r"does not hold a sequence of 1[58] tokens"):
        continuation_logprobs(model, groups)


def test_other_errors_pass(model, groups, limited):
    limited(12, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        continuation_logprobs(model, groups)


@pytest.mark.parametrize("error", ERRORS)
def test_the_public_functions_tell_their_caller(model, tokenizer, limited, error):
    limited(50, error)
    for call in (
        lambda **more: slmfast.perplexity(model, tokenizer, ["a", "b b"], [["x y z"] * 3] * 2, **more),
        lambda **more: slmfast.choose(model, tokenizer, ["a", "b b", "c c c"], ["x y z", "z"], **more),
    ):
        halved = []
        call(progress=False, on_halved=halved.append)
        assert halved


def test_the_budget_follows_the_memory():
    gib = 1 << 30
    tokens = [budgets.budget_for(free, 100_000) for free in (0, gib // 4, gib, 3 * gib, 80 * gib)]
    assert tokens == sorted(tokens) and tokens[0] == budgets.LEAST_TOKENS and tokens[-1] == budgets.CUDA_TOKENS
    for free, chosen in zip((gib // 4, gib, 3 * gib), tokens[1:4], strict=True):
        assert chosen * 100_000 <= free < 4 * chosen * 100_000
        assert chosen & (chosen - 1) == 0


def test_a_token_is_as_wide_as_its_layer(build_model):
    """Two key heads of width 16, a key and a value each, for as many keys as a pack has for a token."""
    config = build_model("gqa").config
    assert budgets.bytes_per_token(config, 2) == 2 * (8 * 64 + 3 * 112 + KEYS_A_TOKEN * 2 * 2 * 16)


def test_configurations_of_other_kinds_have_a_width_too():
    keys = {
        "gpt2": 2 * 12 * 64,  # no key heads are named: as many as heads
        "deepseek_v3": 128 * (128 + 64 + 128),  # keys of two parts
        "mamba": 0,  # no heads at all, and no packs
    }
    assert {name: budgets.key_width(AutoConfig.for_model(name)) for name in keys} == keys
    for name in (*keys, "gemma3n_text", "gemma4_text"):  # the last two have a list or a layer's own widths
        assert budgets.bytes_per_token(AutoConfig.for_model(name), 2) > 0


def test_packs_that_end_by_their_keys_give_the_same_scores(model, plain_logprobs):
    """Short choices behind a long prompt, and prompts that begin one another."""
    rng = np.random.default_rng(4)
    long = rng.integers(0, 700, 180).tolist()
    groups = [Group(long, [rng.integers(0, 700, n).tolist() for n in [2, 1, 3] * 20])]
    groups += [Group(long[:n], [rng.integers(0, 700, 2).tolist()]) for n in range(10, 180, 10)]
    packs = list(make_packs(groups, 400))
    assert len(packs) > 1 and max(map(len, packs)) < 380, "it is not the tokens that end a pack here"
    got = continuation_logprobs(model, groups, batch_tokens=400)
    for group, scores in zip(groups, got, strict=True):
        expected = [plain_logprobs(model, group.prefix, c).sum().item() for c in group.continuations]
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_on_a_cpu_the_budget_is_always_the_same(build_model):
    assert budgets.token_budget(build_model("tied")) == budgets.token_budget(build_model("mqa"))


def test_halving_ends_where_there_is_nothing_left_to_halve(model, limited):
    """Two continuations of one token each take no input: the pack is the prompt's one token."""
    limited(0, ERRORS[0])
    with pytest.raises(UserError, match="does not hold a sequence of 1 tokens"):
        continuation_logprobs(model, [Group([5], [[1], [2]])])


def test_cublas_and_the_driver_name_a_shortage_in_their_own_words():
    for words in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
    ):
        assert forward.is_out_of_memory(RuntimeError(words))


def test_threads_that_share_a_model_score_one_after_the_other(build_model, groups, monkeypatch):
    """Together they would take each other's attention away: scores would be wrong without an error."""
    model = build_model()
    expected = continuation_logprobs(model, groups)
    whole, inside = forward._sums, []

    def slowly(model, weight, batch):
        inside.append(batch)
        time.sleep(0.002)
        assert inside == [batch], "another thread is in the middle of a pass"
        sums = whole(model, weight, batch)
        inside.clear()
        return sums

    monkeypatch.setattr(forward, "_sums", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: continuation_logprobs(model, groups, batch_tokens=60), range(8)))
    for scores in found:
        for ours, theirs in zip(scores, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_rotation_by_the_longest_position_keeps_sequences_apart(plain_logprobs):
    """Past 16 positions this model turns by other factors: a short sequence beside a long one must not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    rotation = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    torch.manual_seed(1)
    rotation |= {"original_max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, rope_parameters=rotation, initializer_range=0.3)).eval()
    rng = np.random.default_rng(0)
    groups = [Group(rng.integers(0, 99, n).tolist(), [rng.integers(0, 99, 4).tolist()]) for n in (5, 9, 30)]
    for group, (got,) in zip(groups, continuation_logprobs(model, groups), strict=True):
        expected = plain_logprobs(model, group.prefix, group.continuations[0]).sum().item()
        assert got == pytest.approx(expected, abs=1e-4)


def test_a_score_is_the_models_own_under_autocast(build_model, groups):
    model = build_model()
    with torch.autocast("cpu", torch.bfloat16):
        got = continuation_logprobs(model, groups)
    for ours, theirs in zip(got, continuation_logprobs(model, groups), strict=True):
        np.testing.assert_array_equal(ours, theirs)
