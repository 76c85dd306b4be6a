"""`slmfast.choose` against a plain forward of every whole choice."""

import numpy as np
import pytest

import slmfast
from slmfast import UserError

PROMPTS = ["Rate the reply.", "What is 17 times 3?", [{"role": "user", "content": "请把下面的句子翻译成英文。"}], "no"]
CHOICES = ["1", "0.5", "0", "0.5 of a unit"]


def render(tokenizer, prompt):
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(whole, add_special_tokens=False)


def close(tokenizer, choice):
    return [*tokenizer.encode(choice, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("shape", ["tied", "gqa", "mqa"])
@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_equals_a_plain_forward_of_each_whole_choice(build_model, tokenizer, plain_logprobs, shape, batch_tokens):
    model = build_model(shape)
    got = slmfast.choose(model, tokenizer, PROMPTS, CHOICES, batch_tokens=batch_tokens, progress=False)
    expected = [
        [plain_logprobs(model, render(tokenizer, prompt), close(tokenizer, choice)).sum() for choice in CHOICES]
        for prompt in PROMPTS
    ]
    assert got.shape == (4, 4) and got.dtype == np.float64
    np.testing.assert_allclose(got, np.array(expected), atol=1e-5)


def test_a_choice_is_not_a_part_of_a_longer_one(model, tokenizer, plain_logprobs):
    """The closing token after "0" makes it another event than "0" with ".5" after it."""
    zero, half = (close(tokenizer, choice) for choice in ("0", "0.5"))
    assert zero[0] == half[0], "the choices begin alike, else this test shows nothing"
    scores = slmfast.choose(model, tokenizer, PROMPTS, ["0", "0.5"], progress=False)
    for prompt, row in zip(PROMPTS, scores, strict=True):
        begins = plain_logprobs(model, render(tokenizer, prompt), zero[:1])[0].item()
        assert np.exp(row).sum() < np.exp(begins), "both are proper parts of what begins with 0"


def test_agrees_with_perplexity(model, tokenizer):
    scores = slmfast.choose(model, tokenizer, PROMPTS, CHOICES, progress=False)
    table = slmfast.perplexity(model, tokenizer, PROMPTS, [CHOICES] * len(PROMPTS), progress=False)
    np.testing.assert_allclose(-scores.ravel() / np.log(2), table["bits"].to_numpy(), rtol=1e-6)


def test_order_of_prompts_and_choices_does_not_matter(model, tokenizer):
    scores = slmfast.choose(model, tokenizer, PROMPTS, CHOICES, progress=False)
    turned = slmfast.choose(model, tokenizer, PROMPTS[::-1], CHOICES[::-1], progress=False)
    assert (turned[::-1, ::-1] == scores).all()


def test_a_prompt_over_the_window_is_unreadable_for_all_choices(model, tokenizer):
    room = len(render(tokenizer, "no")) + max(len(close(tokenizer, choice)) for choice in CHOICES)
    scores = slmfast.choose(model, tokenizer, ["no", "no no"], CHOICES, window=room, progress=False)
    assert np.isfinite(scores[0]).all() and np.isnan(scores[1]).all()


def test_no_prompts_give_no_rows(model, tokenizer):
    assert slmfast.choose(model, tokenizer, [], ["yes", "no"], progress=False).shape == (0, 2)


@pytest.mark.parametrize("prompts", ["hello", None, 5])
def test_prompts_are_a_list(model, tokenizer, prompts):
    with pytest.raises(UserError, match="prompts is a"):
        slmfast.choose(model, tokenizer, prompts, ["yes", "no"], progress=False)


def test_a_window_the_model_does_not_know_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="knows 256 positions"):
        slmfast.choose(model, tokenizer, ["a"], ["yes"], window=300, progress=False)


@pytest.mark.parametrize("choices", [[], "yes", ["yes", ""], ["yes", "yes"], [1], 5, None, ["a\ud800"]])
def test_choices_are_checked(model, tokenizer, choices):
    with pytest.raises(UserError, match="choice"):
        slmfast.choose(model, tokenizer, ["a"], choices, progress=False)


def test_each_prompt_may_have_choices_of_its_own(model, tokenizer):
    own = [["yes", "no"], ["1", "0.5", "0"], ["yes"], ["no", "yes"]]
    got = slmfast.choose(model, tokenizer, PROMPTS, own, progress=False)
    assert [len(row) for row in got] == [2, 3, 1, 2]
    for prompt, some, row in zip(PROMPTS, own, got, strict=True):
        np.testing.assert_allclose(row, slmfast.choose(model, tokenizer, [prompt], some, progress=False)[0], rtol=1e-6)
    assert slmfast.choose(model, tokenizer, PROMPTS, [["yes"]] * 4, window=4, progress=False)[0].tolist() != [0.0]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([["yes", "no"]], "4 prompts but 1 lists"),
        ([["yes"], [], ["a"], ["b"]], r"choices \[\]"),
        ([["yes"], ["a", "a"], ["a"], ["b"]], "stands there twice"),
        ([["yes"], "no", ["a"], ["b"]], "choices"),
    ],
)
def test_choices_of_each_prompt_are_checked(model, tokenizer, choices, message):
    with pytest.raises(UserError, match=message):
        slmfast.choose(model, tokenizer, PROMPTS, choices, progress=False)


def test_several_questions_about_one_text_read_it_once(model, tokenizer, monkeypatch):
    from slmfast.scoring import forward

    sizes = []
    whole = forward._sums

    def counted(model, weight, batch):
        sizes.append(batch.tokens)
        return whole(model, weight, batch)

    monkeypatch.setattr(forward, "_sums", counted)
    text = "the quick brown fox jumps over the lazy dog " * 4
    prompts = [text + question for question in ("yes or no?", "What is 17 times 3?", "1, 0.5 or 0?")]
    scores = slmfast.choose(model, tokenizer, prompts, ["yes", "no"], progress=False)
    together = sum(sizes)
    sizes.clear()
    apart = [slmfast.choose(model, tokenizer, [prompt], ["yes", "no"], progress=False)[0] for prompt in prompts]
    np.testing.assert_allclose(scores, apart, rtol=1e-6)
    assert sum(sizes) - together > 2 * 0.8 * len(tokenizer.encode(text))
