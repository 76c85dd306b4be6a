"""From text to token ids: rendered prompts, replies, and the token that closes a reply.

Prompt and reply are tokenised separately and joined, so that a reply's tokens don't depend on the prompt before it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from slmfast.errors import UserError

Message = dict[str, str]
Prompt = str | Sequence[Message]

_MARK = "\ue000"  # a private-use character stands for a reply when a template is asked what follows one


class Encoder:
    """Makes token ids of prompts and replies.

    With template "chat" a prompt (a str is one user turn) is rendered with the tokenizer's chat template and the
    generation prompt, and the closing token is the special token that the template writes after a reply. With None
    prompts are raw text and the closing token is the end-of-sequence token. No other special token is ever added.
    """

    def __init__(self, tokenizer: Any, template: str | None = "chat"):
        if template not in ("chat", None):
            raise UserError(f"template {template!r} is unknown: use 'chat', or None for raw text")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError("the tokenizer has no chat template: set tokenizer.chat_template, or pass template=None")
        self.tokenizer, self.template = tokenizer, template
        self.closing_token = self._closing_token()

    def prompts(self, prompts: Iterable[Prompt]) -> list[list[int]]:
        """The token ids of each prompt. Raises UserError where there is no list of them, or one can't be rendered."""
        rendered = [self._render(i, prompt) for i, prompt in enumerate(listed_prompts(prompts))]
        return self._tokenize([check_text(f"prompt {i}", text) for i, text in enumerate(rendered)])

    def replies(self, replies: Sequence[str]) -> list[list[int]]:
        """The token ids of each reply, without the closing token."""
        return self._tokenize(list(replies))

    def start_token(self) -> int:
        """What an unconditional score begins with: bos, or eos where there is no bos (lm-eval's convention)."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise UserError("the tokenizer has neither a bos nor an eos token: set one of them")

    def _closing_token(self) -> int:
        if self.template == "chat":
            chat = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
            rendered = self._apply(chat, generation=False)
            after = self._tokenize([rendered.rpartition(_MARK)[2]])[0]
            if after and after[0] in self.tokenizer.all_special_ids:
                return after[0]
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no token that closes a reply: set tokenizer.eos_token")
        return self.tokenizer.eos_token_id

    def _render(self, index: int, prompt: Prompt) -> str:
        if self.template is None:
            if not isinstance(prompt, str):
                raise UserError(f"prompt {index} is no str: with template=None give raw text")
            return prompt
        if prompt is None:
            raise UserError(f"prompt {index} is null: leave it out, with its replies")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not _are_messages(messages):
            raise UserError(f"prompt {index} is neither a str nor a list of {{role, content}} messages")
        try:
            return self._apply(list(messages), generation=True)
        except TemplateError as error:
            raise UserError(f"the chat template refuses prompt {index} ({error}): mend its roles and order") from error

    def _apply(self, messages: list[Message], *, generation: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a text over the tokenizer's own idea of a window is our business, not a warning's.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def listed_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Prompts of any make as a list. Raises UserError where they are one str or nothing that can be gone through."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts is a {type(prompts).__name__}: give a list of prompts")
    return listed(prompts)


def listed(values: Iterable[Any]) -> list[Any]:
    """A column of any make as Python objects: Arrow's, polars', pandas', numpy's or any iterable; null is None."""
    if not isinstance(values, pa.Array | pa.ChunkedArray) and hasattr(values, "__arrow_c_stream__"):
        try:
            values = pa.chunked_array(values)
        except pa.ArrowException:  # a pandas column of objects of several types
            values = list(values)
    return values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    """A value of a column as a Python object. pandas reads lists as numpy arrays, and a null among texts as NaN."""
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, list | tuple | np.ndarray) or hasattr(value, "__arrow_c_stream__"):
        return listed(value)
    return value


def check_text(name: str, text: str) -> str:
    """The text itself. Raises UserError where it holds a lone surrogate, of which no tokenizer can make tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} holds a lone surrogate, which UTF-8 can't encode: drop or repair it") from error
    return text


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) > 0
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )
