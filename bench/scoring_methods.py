"""Ways to the log-probability of replies: ours through its public name, and the peers'.

Every method takes the same model, prompts, replies and token ids, and gives one sum of natural log-probabilities a
reply, float64 [replies], in the order of `slmfast.perplexity`'s rows. Ours also tokenises; the peers are given ids.
"""

import importlib.metadata
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scoring_texts import Pair, TextSet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import slmfast

IGNORED = -100  # the label of what is not scored


@dataclass(frozen=True)
class Subject:
    """What is scored with."""

    model: nn.Module
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


Run = Callable[[Subject, TextSet, int], np.ndarray]  # the last is the sequences of a batch


@dataclass(frozen=True)
class Method:
    """A way to score replies."""

    title: str
    version: str | None
    run: Run
    batched: bool = True
    """Whether it takes a number of sequences a batch, which is then chosen by trial."""
    most_copies: int = 2
    """Tensors of the logits' size in fp32 that it holds at once: what limits its batches."""


def ours(subject: Subject, texts: TextSet, _: int = 0) -> np.ndarray:
    """`slmfast.perplexity`, from texts to scores."""
    table = slmfast.perplexity(subject.model, subject.tokenizer, texts.prompts, texts.replies, progress=False)
    return table["bits"].to_numpy() * -math.log(2)


def ours_unshared(subject: Subject, texts: TextSet, _: int = 0) -> np.ndarray:
    """The same, but each reply of a prompt in a call of its own, so that no prompt is shared."""
    columns = []
    for number in range(len(texts.replies[0])):
        single = [[several[number]] for several in texts.replies]
        columns.append(ours(subject, replace(texts, replies=single)))
    return np.stack(columns, axis=1).reshape(-1)


@torch.no_grad()
def plain(subject: Subject, texts: TextSet, _: int = 0) -> np.ndarray:
    """Each sequence alone through the model's own forward; log-softmax of the whole logits in fp32."""
    sums = []
    for pair in texts.flat():
        ids = torch.tensor([pair.context + pair.continuation], device=subject.device)
        logprobs = subject.model(ids).logits[0, :-1].float().log_softmax(-1)
        scored = logprobs[len(pair.context) - 1 :].gather(1, ids[0, len(pair.context) :, None])
        sums.append(float(scored.double().sum()))
    return np.array(sums)


def harness(subject: Subject, texts: TextSet, batch: int) -> np.ndarray:
    """lm-eval's own loglikelihood over token ids: sorted by length, log-softmax over the whole logits.

    The softmax is in fp32, as evaluations of low-precision models ask for. With lm-eval's default a bf16 model's scores
    are added up in bf16: a sum of -1000 is then off by up to 2 nats, and no peer's answer.
    """
    from lm_eval.models.huggingface import HFLM

    # It warns of every model that is given and not named, which is no news here.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    harness = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch, softmax_dtype=torch.float32)
    requests = [(None, list(pair.context), list(pair.continuation)) for pair in texts.flat()]
    return np.array([score for score, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)])


@torch.no_grad()
def evaluate_metric(subject: Subject, texts: TextSet, batch: int) -> np.ndarray:
    """As the perplexity metric of `evaluate` describes itself: padded batches in the order given, whole logits.

    The metric scores whole texts. Here the prompt is masked as the padding is, so that both answer one question.
    """
    sums = []
    for ids, mask, labels in _batches(texts.flat(), batch, subject.device, multiple=1):
        logits = subject.model(ids, attention_mask=mask).logits[:, :-1].contiguous()
        scored = (labels[:, 1:] != IGNORED).to(torch.int64)
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:].contiguous(), reduction="none")
        sums += (-(losses * scored).double().sum(1)).tolist()
    return np.array(sums)


@torch.no_grad()
def cal_ppl(subject: Subject, texts: TextSet, batch: int) -> np.ndarray:
    """As LLaMA-Factory's cal_ppl.py goes about it: padded to eights, in the order given, prompts by ignored labels."""
    sums = []
    for ids, mask, labels in _batches(texts.flat(), batch, subject.device, multiple=8):
        logits = subject.model(ids, attention_mask=mask).logits[:, :-1].contiguous()
        targets = labels[:, 1:].contiguous()
        losses = cross_entropy(
            logits.view(-1, logits.shape[-1]), targets.view(-1), reduction="none", ignore_index=IGNORED
        )
        sums += (-losses.view(targets.shape).double().sum(1)).tolist()
    return np.array(sums)


def _batches(
    pairs: Sequence[Pair], batch: int, device: torch.device, multiple: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(ids, attention mask, labels), int64 [batch, longest]: padded on the right, labels IGNORED but for replies."""
    for begin in range(0, len(pairs), batch):
        some = pairs[begin : begin + batch]
        length = math.ceil(max(map(len, some)) / multiple) * multiple
        ids, mask = (torch.zeros(len(some), length, dtype=torch.int64) for _ in range(2))
        labels = torch.full((len(some), length), IGNORED)
        for row, pair in enumerate(some):
            ids[row, : len(pair)] = torch.tensor(pair.context + pair.continuation)
            mask[row, : len(pair)] = 1
            labels[row, len(pair.context) : len(pair)] = torch.tensor(pair.continuation)
        yield ids.to(device), mask.to(device), labels.to(device)


def _version(package: str) -> str:
    return importlib.metadata.version(package)


OURS = Method("slmfast", slmfast.__version__, ours, batched=False)
UNSHARED = Method("slmfast, a call for each reply", slmfast.__version__, ours_unshared, batched=False)
PLAIN = Method("transformers, one at a time", _version("transformers"), plain, batched=False)
HARNESS = Method("lm-eval HFLM loglikelihood", _version("lm-eval"), harness)
EVALUATE = Method("method of evaluate's perplexity", None, evaluate_metric, most_copies=3)
CAL_PPL = Method("method of LLaMA-Factory's cal_ppl", None, cal_ppl, most_copies=3)
METHODS = {
    "ours": OURS,
    "plain": PLAIN,
    "harness": HARNESS,
    "evaluate": EVALUATE,
    "cal_ppl": CAL_PPL,
}
"""By the names that bench/scoring_child.py knows them under."""
