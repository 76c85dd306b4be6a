"""Which reply wins and which loses."""

import itertools
import random

import numpy as np
import pytest

from slmfast.alignment import choose_replies, shuffled_apart, upper_fence


def reply(text="a", finish="stop"):
    return {"origin": "original", "text": text, "finish_reason": finish}


def rating(safety=1.0, quality=1.0, perplexity=2.0, bits=1.0, tokens=5):
    return {
        "tokens": tokens,
        "bits_per_token": bits,
        "perplexity": perplexity,
        "safety": safety,
        "quality": quality,
    }


def choose(replies, ratings, max_tokens=None, max_bits=float("inf")):
    return choose_replies(replies, ratings, max_tokens=max_tokens, max_bits=max_bits)


THREE = [reply("a"), reply("b"), reply("c")]


def test_safety_before_quality_before_perplexity():
    assert choose(THREE, [rating(0.5), rating(1), rating(1, 0.5)]) == (1, 0)
    assert choose(THREE, [rating(1, 0), rating(1, 1), rating(1, 0.5)]) == (1, 0)
    assert choose(THREE, [rating(perplexity=3), rating(perplexity=2), rating(perplexity=9)]) == (1, None)


def test_equals_keep_the_source_order():
    assert choose(THREE, [rating(), rating(), rating(quality=0)]) == (0, 2)


def test_best_needs_quality_one_and_a_safe_reply():
    assert choose(THREE, [rating(quality=0.5), rating(quality=0), rating(safety=0)]) == (None, None)


def test_an_unsafe_reply_loses_to_a_refusal():
    assert choose(THREE, [rating(safety=0), rating(safety=0.5), rating(safety=0.5, quality=0)]) == (1, 0)


def test_null_neither_wins_nor_loses():
    assert choose(THREE, [rating(quality=None), rating(perplexity=9), rating(safety=None, quality=0)]) == (1, None)


def test_gates_keep_from_winning_not_from_losing():
    cut = [reply("a", "length"), reply("b"), reply("c")]
    assert choose(cut, [rating(perplexity=1), rating(perplexity=2), rating(perplexity=3)]) == (1, None)
    assert choose(THREE, [rating(bits=9), rating(), rating(quality=0, bits=9)], max_bits=5) == (1, 2)
    assert choose(THREE, [rating(tokens=99), rating(perplexity=5), rating(quality=0)], max_tokens=10) == (1, 2)


def test_the_worst_differs_in_text():
    assert choose([reply("a"), reply(" a ")], [rating(), rating(quality=0)]) == (0, None)


def test_upper_fence():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.nan])
    assert upper_fence(values, 3.0) == pytest.approx(4 + 3 * 2)
    assert upper_fence(np.array([np.nan]), 3.0) == float("inf")
    assert upper_fence(np.ones(5), 3.0) == 1 and upper_fence(np.ones(5), float("inf")) == float("inf")


@pytest.mark.parametrize("seed", range(20))
def test_no_two_neighbours_share_a_prompt(seed):
    draw = random.Random(seed)
    prompts = [p for p in range(30) for _ in range(draw.randint(1, 3))]
    order = shuffled_apart(prompts, np.random.default_rng(seed).integers(0, 2**63, len(prompts)).astype(np.uint64))
    assert sorted(order) == list(range(len(prompts)))
    assert all(prompts[a] != prompts[b] for a, b in itertools.pairwise(order))


def test_one_prompt_alone_can_not_be_kept_apart():
    assert sorted(shuffled_apart([4, 4, 4], np.array([3, 1, 2], np.uint64))) == [0, 1, 2]
