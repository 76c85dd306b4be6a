"""Who is kept: against a plain greedy oracle, and by the laws that design.md and csrc/clusters.hpp state."""

import functools
import random

import numpy as np
import pyarrow as pa
import pytest

from slmfast import _native, dedup, simhash
from slmfast.arrow_texts import native_texts, normalise

ENGLISH = (
    "the quick brown fox jumps over a lazy dog while seven wizards boldly query fjord maps and vex new zebras".split()
)
CHINESE = "请用中文写一篇关于人工智能的短文介绍它在医疗教育和交通领域的应用并说明未来的发展方向与挑战给出三个例子"
FULL = 3  # the native RowState of a row with enough grams


normal_form = functools.cache(normalise)  # tested against unicodedata in test_simhash.py


@functools.cache
def grams(text: str, n: int = 3) -> frozenset[str]:
    text = normal_form(text)
    width = min(n, len(text))
    return frozenset(text[i : i + width] for i in range(len(text) - width + 1) if text)


def matches(a: str, b: str, fingerprints: tuple[int, int], k: int, verify: float | None) -> bool:
    """The contract for one pair of rows that are neither null nor empty, read from design.md section 8."""
    if normal_form(a) == normal_form(b):
        return True
    one, two = grams(a), grams(b)
    if min(len(one), len(two)) < 4 or (fingerprints[0] ^ fingerprints[1]).bit_count() > k:
        return False
    return verify is None or len(one & two) / len(one | two) >= verify


def oracle(texts: list[str | None], k: int, verify: float | None, mode: str) -> list[int]:
    fingerprints = simhash(texts).tolist()
    near = [
        [
            j
            for j in range(i)
            if texts[i] and texts[j] and matches(texts[i], texts[j], (fingerprints[i], fingerprints[j]), k, verify)
        ]
        for i in range(len(texts))
    ]
    stand_in = list(range(len(texts)))
    if mode == "representative":
        for i, earlier in enumerate(near):
            stand_in[i] = next((j for j in earlier if stand_in[j] == j), i)
        return stand_in
    for i, earlier in enumerate(near):
        for j in earlier:
            low, high = sorted((stand_in[i], stand_in[j]))
            stand_in = [low if s == high else s for s in stand_in]
    return stand_in


def edited(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        place = rng.randrange(len(text) + 1)
        text = rng.choice([text[:place] + text[place + 1 :], text[:place] + rng.choice("ab的了1，") + text[place:]])
    return rng.choice([text, text, text.upper(), text.replace(",", "，"), text + "…"])


def corpus(seed: int, count: int) -> list[str | None]:
    """Families of edited texts in both languages, short ones, repetitive ones, nulls and empties."""
    rng = random.Random(seed)
    bases = []
    for _ in range(count // 8):
        if rng.random() < 0.5:
            bases.append(" ".join(rng.choices(ENGLISH, k=rng.randint(3, 60))))
        else:
            bases.append("".join(rng.choices(CHINESE, k=rng.randint(5, 200))))
    odd = [
        "",
        None,
        "a",
        "A",
        "好",
        "好的",
        "abc",
        "ABCDE",
        "abcde",
        "哈哈哈哈哈哈",
        "哈哈哈哈哈哈哈哈",
        "½",
        "1⁄2",
        "哈" * 90 + "甲乙丙丁",
    ]
    return [rng.choice(odd) if rng.random() < 0.15 else edited(rng, rng.choice(bases)) for _ in range(count)]


@pytest.mark.parametrize("mode", ["representative", "components"])
@pytest.mark.parametrize(("k", "verify"), [(0, 0.8), (3, 0.8), (3, None), (7, 0.6), (8, None), (8, 0.0), (3, 1.0)])
def test_equals_the_oracle(k, verify, mode):
    for seed in range(3):
        texts = corpus(seed, 350)
        result = dedup(texts, k=k, verify=verify, mode=mode)
        expected = oracle(texts, k, verify, mode)
        assert result.duplicate_of.tolist() == expected
        assert result.keep.tolist() == [i == stand_in for i, stand_in in enumerate(expected)]
        assert result.n_kept == sum(result.keep) < len(texts)


def test_result_types_and_distances():
    texts = corpus(9, 400)
    result = dedup(texts, k=6)
    fingerprints = simhash(texts)
    assert (result.keep.dtype, result.duplicate_of.dtype, result.distance.dtype) == (bool, np.int64, np.uint8)
    assert np.array_equal(result.distance, np.bitwise_count(fingerprints ^ fingerprints[result.duplicate_of]))
    assert 0 < result.distance.max() <= 6 and not result.distance[result.keep].any()
    assert (result.duplicate_of <= np.arange(len(texts))).all() and result.keep[result.duplicate_of].all()


def test_kept_rows_are_a_fixed_point():
    texts = corpus(4, 600)
    kept = [text for text, keep in zip(texts, dedup(texts).keep, strict=True) if keep]
    assert dedup(kept).n_kept == len(kept)


def test_nulls_and_empty_texts_match_nothing():
    for mode in ("representative", "components"):
        assert dedup([None, "", None, "", None], mode=mode, verify=None).keep.all()
    assert dedup([]).n_kept == 0


def test_short_texts_match_only_equal_normalised_texts():
    texts = ["abcde", "ABCDE", "abcdf", "ab", "ａｂ", "哈哈哈哈哈哈", "哈哈哈哈哈哈哈", "哈哈哈哈哈哈"]
    for verify in (0.8, 0.0, None):
        assert dedup(texts, k=8, verify=verify).duplicate_of.tolist() == [0, 0, 2, 3, 3, 5, 6, 5]


def test_normalisation_variants_are_duplicates_in_priority_order():
    texts = ["What is 3 + 4? Please answer.", "what is ３ + ４？ PLEASE ANSWER.", "WHAT IS 3 + 4? please answer."]
    assert dedup(texts).duplicate_of.tolist() == [0, 0, 0]
    assert dedup(texts[::-1]).duplicate_of.tolist() == [0, 0, 0]


def test_verification_parts_texts_that_a_long_run_makes_look_alike():
    texts = ["哈" * 200 + "今天天气很好", "哈" * 200 + "请写一首诗歌吧"]
    assert dedup(texts, verify=None).n_kept == 1
    assert dedup(texts, verify=0.8).n_kept == 2


def test_chains_merge_only_when_asked():
    def fingerprints_of_a_chain(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.uint64)

    chain = fingerprints_of_a_chain(0b0, 0b111, 0b111111)
    assert cluster(chain, k=3, components=False)[0].tolist() == [0, 0, 2]
    assert cluster(chain, k=3, components=True)[0].tolist() == [0, 0, 0]
    assert cluster(chain, k=3, components=True)[1].tolist() == [0, 3, 6]


def cluster(fingerprints: np.ndarray, *, k: int, components: bool, threads: int = 1, pair_budget: int = 0):
    """Plain SimHash clusters of given fingerprints; the texts are not looked at."""
    n = len(fingerprints)
    texts = native_texts(pa.chunked_array([pa.array(["x"] * n)]))
    nothing = native_texts(pa.chunked_array([pa.array([], pa.string())]))
    states = np.full(n, FULL, dtype=np.uint8)
    none = np.empty(0, dtype=np.int64)
    settings = {"k": k, "components": components, "verify": None, "ngram": 3}
    return _native.cluster(
        texts, nothing, none, fingerprints, states, **settings, threads=threads, pair_budget=pair_budget
    )


def greedy(fingerprints: np.ndarray, k: int) -> list[int]:
    kept: list[int] = []
    stand_in = []
    for row, value in enumerate(fingerprints):
        near = np.flatnonzero(np.bitwise_count(fingerprints[kept] ^ value) <= k) if kept else []
        stand_in.append(kept[near[0]] if len(near) else row)
        if not len(near):
            kept.append(row)
    return stand_in


@pytest.mark.parametrize("pair_budget", [1, 2, 50, 3000, 0])
@pytest.mark.parametrize("threads", [1, 3])
def test_pairs_held_are_bounded_and_the_bound_changes_nothing(pair_budget, threads):
    rng = np.random.default_rng(8)
    centres = rng.integers(0, 2**64, 40, dtype=np.uint64)
    values = centres[rng.integers(0, 40, 1500)]
    for _ in range(5):
        values ^= (np.uint64(1) << rng.integers(0, 64, 1500, dtype=np.uint64)) * (rng.random(1500) < 0.6)
    for k in (2, 5):
        found, distance = cluster(values, k=k, components=False, threads=threads, pair_budget=pair_budget)
        assert found.tolist() == greedy(values, k)
        assert np.array_equal(distance, np.bitwise_count(values ^ values[found]))


def test_a_bound_on_pairs_with_verification(monkeypatch):
    texts = corpus(12, 300)
    expected = dedup(texts, k=8, verify=0.7).duplicate_of.tolist()
    monkeypatch.setattr(_native, "cluster", functools.partial(_native.cluster, pair_budget=3))
    assert dedup(texts, k=8, verify=0.7).duplicate_of.tolist() == expected == oracle(texts, 8, 0.7, "representative")


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("mode", ["representative", "components"])
def test_same_answer_on_any_threads_and_instruction_set(isa, mode, monkeypatch):
    texts = corpus(7, 3000)
    expected = dedup(texts, mode=mode, k=5, threads=1)
    monkeypatch.setenv("SLMFAST_ISA", isa)
    for threads in (1, 2, 7):
        again = dedup(texts, mode=mode, k=5, threads=threads)
        assert again.duplicate_of.tobytes() == expected.duplicate_of.tobytes()
        assert again.distance.tobytes() == expected.distance.tobytes()


def test_many_equal_rows_stay_linear():
    texts = pa.array(["The very same instruction, said again and again."] * 200_000 + ["Another one."])
    assert dedup(texts).n_kept == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "chains"}, "mode must be representative or components"),
        ({"verify": 1.5}, "verify"),
        ({"verify": float("nan")}, "verify"),
        ({"k": 9}, "k must"),
        ({"ngram": 0}, "ngram"),
    ],
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        dedup(["some text"], **setting)


@pytest.mark.parametrize("setting", ["k", "ngram", "threads", "verify"])
@pytest.mark.parametrize("value", ["x", [3]])
def test_settings_that_are_no_numbers_are_named(setting, value):
    with pytest.raises(TypeError, match=f"{setting} must be "):
        dedup(["a text"], **{setting: value})


def test_k_may_not_be_left_out():
    with pytest.raises(TypeError, match="k must be a whole number, not None"):
        dedup(["a text"], k=None)
    with pytest.raises(TypeError, match=r"ngram must be a whole number, not 2\.5"):
        simhash(["a text"], ngram=2.5)
