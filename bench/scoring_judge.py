"""Judging: three questions on every pair by the log-probability of fixed answers, against decoding the answers.

Weights are random here, so what is decoded can't be read and can't be compared with what is chosen. What is compared
is every choice's log-probability, with that of a plain forward of the whole sequence; decoding is the peer in time.
A trained judge may close its answer early, and a random one never does: the row of two tokens stands for the former.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import timing
import torch
import transformers
from result_table import Result
from scoring_context import Context, relay, worth_trying
from scoring_gate import same_answer
from scoring_methods import PLAIN
from scoring_texts import SHORT, Pair, TextSet, closing_token, token_ids

import slmfast
from slmfast import prompts as judging

NEW_TOKENS = 8  # at most, of a decoded answer
AT_ONCE = 2  # of an answer of one token that is closed at once


def judge_case(context: Context) -> Iterator[Result]:
    """`slmfast.choose` beside `generate` with its best batch size, over the questions that the stage `rate` puts."""
    texts = context.texts.draw(context.sizes.judged, 3, SHORT)
    pairs = [(prompt, reply) for prompt, several in zip(texts.prompts, texts.replies, strict=True) for reply in several]
    yes_no = [judging.instruction_safety_prompt(prompt) for prompt in texts.prompts]
    yes_no += [judging.reply_safety_prompt(*pair) for pair in pairs]
    quality = [judging.quality_prompt(*pair) for pair in pairs]
    asked = [(yes_no, judging.YES_NO), (quality, judging.QUALITY_CHOICES)]
    choices = [list(answers) for some, answers in asked for _ in some]

    def ours() -> np.ndarray:
        model, tokenizer = context.subject.model, context.tokenizer
        return np.concatenate(slmfast.choose(model, tokenizer, yes_no + quality, choices, progress=False))

    questions = _question_ids(context.tokenizer, yes_no + quality)
    mean = sum(map(len, questions)) / len(questions)
    what = (
        f"judge, {texts.source}, {len(texts.prompts)} prompts of 3 replies: {len(questions)} questions (is the prompt "
        f"safe, the reply, how good is it) of {mean:.0f} tokens"
    )
    context.say(what)
    candidates = _candidates(context.tokenizer, asked)
    tokens = np.array([len(pair.continuation) for pair in candidates.flat()])
    expected = PLAIN.run(context.subject, candidates, 1)
    same = same_answer(ours(), expected, tokens, context.truth(candidates))
    batch = _best_batch(context, questions)
    limits = (NEW_TOKENS, AT_ONCE)
    sides = {str(limit): (lambda limit=limit: decode(context, questions, limit, batch)) for limit in limits}
    runs, timed = relay({"ours": ours, **sides})
    for limit in limits:
        mine, theirs = timed["ours"].seconds, timed[str(limit)].seconds
        yield Result(
            group="judge",
            case=f"{what}; at most {limit} new tokens; {batch} a batch; {timing.described_runs(runs)}; the choices' "
            "log-probabilities checked against a plain forward",
            peer="transformers generate",
            version=transformers.__version__,
            ours=mine,
            theirs=theirs,
            unit="s",
            ratio=theirs / mine if same else None,
            same_answer=same,
        )


@torch.no_grad()
def decode(context: Context, questions: Sequence[list[int]], limit: int, batch: int) -> list[str]:
    """Greedy answers of at most `limit` tokens, in batches sorted by length and padded on the left."""
    closing = closing_token(context.tokenizer)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]), reverse=True)
    answers = [""] * len(questions)
    for begin in range(0, len(order), batch):
        some = order[begin : begin + batch]
        length = len(questions[some[0]])
        ids = torch.tensor([[closing] * (length - len(questions[i])) + questions[i] for i in some])
        mask = torch.tensor([[0] * (length - len(questions[i])) + [1] * len(questions[i]) for i in some])
        given = context.subject.model.generate(
            input_ids=ids.to(context.device),
            attention_mask=mask.to(context.device),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=closing,
            pad_token_id=closing,
        )
        for i, text in zip(some, context.tokenizer.batch_decode(given[:, length:]), strict=True):
            answers[i] = text
    return answers


def _best_batch(context: Context, questions: Sequence[list[int]]) -> int:
    some = questions[: max(context.sizes.batches)]
    decode(context, some[:1], AT_ONCE, 1)  # a first call pays for what is set up once
    tried = {}
    for batch in worth_trying(context.sizes.batches, len(some)):
        tried[batch], _ = timing.stopwatch(lambda batch=batch: decode(context, some, NEW_TOKENS, batch))
        context.say(f"generate: {batch} a batch, {tried[batch]:.2f} s for {len(some)} questions")
    return min(tried, key=tried.__getitem__)


def _question_ids(tokenizer: Any, questions: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
    return token_ids(tokenizer, texts)


def _candidates(tokenizer: Any, asked: Sequence[tuple[list[Any], Sequence[str]]]) -> TextSet:
    """Every question with each of its choices, as pairs of token ids for a plain forward."""
    pairs = []
    for questions, choices in asked:
        closed = [(*ids, closing_token(tokenizer)) for ids in token_ids(tokenizer, choices)]
        pairs += [[Pair(tuple(ids), choice) for choice in closed] for ids in _question_ids(tokenizer, questions)]
    return TextSet("questions", SHORT, ["" for _ in pairs], [["" for _ in several] for several in pairs], pairs)
