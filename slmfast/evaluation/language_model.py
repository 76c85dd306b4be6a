"""A model as lm-eval sees it: its log-likelihoods on the packed scorer, its generations on continuous batching.

Items are encoded as lm-eval's own HFLM encodes them, so that results equal HFLM's one by one. What many items begin
with, such as the worked examples of a subject, is computed once a pack. HFLM cuts an input that is over the window
from the left; here such an item is refused by name.
"""

import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from slmfast.engines.decoding import decode, occurrences, uniforms
from slmfast.errors import UserError
from slmfast.evaluation.generation import Generation, generation_of
from slmfast.progress import Progress
from slmfast.scoring.forward import continuation_scores
from slmfast.scoring.loading import config_window, evaluating
from slmfast.scoring.packing import Group

SEED = 1234  # of replies that a task wants sampled: lm-eval's own seed of torch
SHARING = 4  # a pack holds as many tokens as so many of the longest items, or what they share is computed too often
LEAST_TOKENS, MOST_TOKENS = 2048, 16384  # of a pack, whatever memory there is: results are a function of the items

Encoded = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]  # texts, tokens of context and continuation


class _Refused(Exception):
    """A request that can't be scored: its number, and why."""

    def __init__(self, number: int, why: str):
        super().__init__(why)
        self.number = number


class PackedLM(TemplateLM):
    """lm-eval's interface over one model of `transformers`, in the dtype and on the device that it is in.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        slots: how many replies are written side by side.
        batch_tokens: tokens that are scored together; by the items' lengths unless given.
        progress: whether to show it.

    Raises:
        UserError: the model states no window.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        slots: int = 64,
        batch_tokens: int | None = None,
        progress: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.batch_tokens, self.progress = slots, batch_tokens, progress
        self.max_length = config_window(model.config)
        self.max_gen_toks = 256  # of a task that doesn't say, as in HFLM
        # An item's choices are encoded one after the other, each with the same context.
        self._encode = functools.lru_cache(maxsize=8)(self._encoded)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for: bos, or eos where there is no bos."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them by default, never a second bos."""
        return self._encode(string, add_special_tokens)

    def _encoded(self, string: str, special: bool | None) -> list[int]:
        if special is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        return self.tokenizer(string, verbose=False, **options)["input_ids"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[Any, Any]:
        # Arrays take a ninth of the memory of lists: a whole suite has tens of millions of tokens.
        return tuple(np.asarray(ids, dtype=np.int32) for ids in super()._encode_pair(context, continuation))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A rendered chat, as HFLM renders it; where the template refuses a system message, without it."""
        kinds = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        try:
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **kinds)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise UserError(f"the chat template refuses an item ({error}): leave the template out") from error
            warnings.warn("the chat template takes no system message: items go without it, as in HFLM", stacklevel=2)
            return self.tokenizer.apply_chat_template(others, tokenize=False, **kinds)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each context and continuation the log-probability in nats, and whether it is the greedy one.

        Raises:
            UserError: an item is over the window, by its name; or as `scoring.forward.continuation_scores`.
        """
        return self._named(requests, super().loglikelihood, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability in nats of each whole text, in windows that follow one another as HFLM's do."""
        windows: list[Encoded] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in found]
            windows += [(None, *pair) for pair in pairs]
            owners += [number] * len(pairs)
        sums = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += score
        return sums

    def _named(self, requests: list[Instance], run: Callable[..., Any], **options: Any) -> Any:
        try:
            return run(requests, **options)
        except _Refused as error:
            raise UserError(f"{_name(requests[error.number])} {error}") from error

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        members: dict[bytes, list[int]] = defaultdict(list)  # of every context, its requests
        for number, (_, context, continuation) in enumerate(requests):
            # The last token is predicted and never read.
            if len(context) + len(continuation) - 1 > self.max_length:
                raise _Refused(number, self._too_long(len(context) + len(continuation)))
            if len(context) == 0:
                raise _Refused(number, "has a question without tokens: mend the task's doc_to_text")
            if len(continuation) == 0:
                raise _Refused(number, "has a choice without tokens: mend the task's doc_to_choice")
            members[np.asarray(context, dtype=np.int32).tobytes()].append(number)
        groups = [
            Group(np.frombuffer(key, dtype=np.int32), [requests[number][2] for number in numbers])
            for key, numbers in members.items()
        ]
        shown = "evaluate: choices" if self.progress else None
        tokens = self.batch_tokens or pack_tokens(groups)
        scores = continuation_scores(self.model, groups, batch_tokens=tokens, progress=shown)
        found: list[tuple[float, bool]] = [(np.nan, False)] * len(requests)
        for numbers, group in zip(members.values(), scores, strict=True):
            for number, logprob, greedy in zip(numbers, group.logprob.tolist(), group.greedy.tolist(), strict=True):
                found[number] = logprob, greedy
        return found

    def _too_long(self, tokens: int) -> str:
        return (
            f"takes {tokens} tokens, but the model's window has {self.max_length}: "
            "use fewer shots or another task (recipe key evaluate.tasks)"
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """A reply to each context up to the first of its stop strings, greedy unless the task wants it sampled.

        A model's own generation config counts as it does in HFLM: its end tokens, and its repetition penalty.

        Raises:
            UserError: a context leaves no room for the reply, by the item's name; a task or the model's generation
                config asks for a way of decoding that is not known here.
        """
        several: dict[Generation, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            _, kwargs = request.args
            several[generation_of(kwargs, self.model, self.max_gen_toks, request.task_name)].append(number)
        replies = [""] * len(requests)
        for generation, numbers in several.items():
            contexts = [self._context(requests[number], generation) for number in numbers]
            for number, reply in zip(numbers, self._generate(contexts, generation), strict=True):
                replies[number] = reply
        return replies

    def _context(self, request: Instance, generation: Generation) -> list[int]:
        text = request.args[0]
        bos = self.tokenizer.bos_token
        ids = self.tok_encode(text, False if bos and text.startswith(bos) else None)
        if len(ids) + generation.max_tokens > self.max_length:
            raise UserError(f"{_name(request)} {self._too_long(len(ids) + generation.max_tokens)}")
        if not ids:
            raise UserError(f"{_name(request)} has an empty question: mend the task's doc_to_text")
        return ids

    def _generate(self, contexts: list[list[int]], generation: Generation) -> list[str]:
        numbers = occurrences(contexts)
        # By length and content: what is written side by side depends on no order.
        order = sorted(range(len(contexts)), key=lambda i: (len(contexts[i]), contexts[i], numbers[i]))
        ids = [contexts[i] for i in order]
        draws = None
        if generation.sampling.temperature > 0 and ids:
            draws = np.stack([uniforms(contexts[i], numbers[i], generation.max_tokens, SEED) for i in order])
        until = handle_stop_sequences(list(generation.until), eos=self.tokenizer.decode(self.eot_token_id))
        ends = frozenset([self.eot_token_id, *generation.ends])
        shown = Progress("evaluate: replies", unit="tokens") if self.progress else None
        stopped = self._stopped(until, shown)
        with evaluating(self.model):
            tokens = decode(
                self.model,
                ids,
                ends,
                generation.max_tokens,
                draws,
                generation.sampling,
                slots=self.slots,
                stopped=stopped,
            )
        if shown:
            shown.close()
        replies = [""] * len(contexts)
        for i, reply in zip(order, tokens, strict=True):
            text = self.tokenizer.decode(reply, skip_special_tokens=True)
            replies[i] = postprocess_generated_text(text, until, think_end_token=None)
        return replies

    def _stopped(self, terms: Sequence[str], shown: Progress | None) -> Callable[[Sequence[int]], bool]:
        """Whether a reply's newest token completes a stop string, which may be a special token."""
        # A term that ends with the newest token spans as many tokens as it has bytes at most. One more, since some
        # tokenizers drop a space before the first.
        reach = 1 + max((len(term.encode()) for term in terms), default=0)

        def stopped(reply: Sequence[int]) -> bool:
            if shown:
                shown.add()
            text = self.tokenizer.decode(reply[-reach:])
            return any(term in text for term in terms)

        return stopped


def pack_tokens(groups: Sequence[Group]) -> int:
    """The tokens of a pack, a power of two: several of the longest items, within the limits."""
    longest = max((len(group.prefix) + max(map(len, group.continuations)) for group in groups), default=1)
    return min(max(LEAST_TOKENS, 1 << (SHARING * longest - 1).bit_length()), MOST_TOKENS)


def _name(request: Instance) -> str:
    return f"item {request.doc_id} of task {request.task_name}"
