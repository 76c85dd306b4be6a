"""One raw object -> prompt and reply, for the schema of each seed dataset.

Laws for all of them: a dialogue is one record, whose prompt is every turn before the last assistant turn; an
instruction and its input are joined by a line break, the instruction first, but a passage to be read (the context of
Dolly and COIG) before the question on it; line breaks around a text don't belong to it. A parser raises BadRecord,
naming the field, for an object that is not of its schema.

Schemas: the dataset cards of BELLE (train_3.5M_CN, school_math_0.25M), COIG, CAMEL, Dolly and Alpaca-GPT4.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from slmfast.readers.json_stream import DECODER, Malformed

_ROUND = re.compile(r"round_(0|[1-9][0-9]{0,3})")
_ROLES = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


class BadRecord(Exception):
    """A raw object that gives no record. The message names the field and what is wrong with it."""


class Parsed(NamedTuple):
    """What a raw object says."""

    prompt: list[dict[str, str]]
    reply: str
    source_category: str | None = None


def parse_belle(item: dict[str, Any]) -> Parsed:
    """`conversations: [{from, value}]`, or `conversation: [{human, assistant}]`, or the Alpaca form.

    BELLE's evaluation set has `question, std_answer, class`.
    """
    if "conversations" in item:
        turns = [_turn(turn, i) for i, turn in enumerate(_items(item, "conversations"))]
        return _dialogue(turns, "conversations")
    if "conversation" in item:
        turns = []
        for i, pair in enumerate(_items(item, "conversation")):
            for key, role in (("human", "user"), ("assistant", "assistant")):
                turns.append((role, _text(pair, key, f"conversation[{i}].{key}")))
        return _dialogue(turns, "conversation")
    if "std_answer" in item:
        return _single([_instruction(item, "question")], _text(item, "std_answer"), _category(item, "class"))
    return parse_alpaca(item)


def parse_coig(item: dict[str, Any]) -> Parsed:
    """Any of COIG's five corpora, told apart by their keys."""
    if "textbox_answer" in item or "textbox_question" in item:
        prompt = [_optional(item, f"textbox_{key}") for key in ("q_instruction", "q_context", "question")]
        reply = _optional(item, "textbox_answer_analysis") or _text(item, "textbox_answer")
        return _single(prompt, reply, _category(item, "subject"))
    if "trans_instruction" in item:
        prompt = [_instruction(item, "trans_instruction"), _optional(item, "trans_input")]
        return _single(prompt, _text(item, "trans_output"))
    if any(_ROUND.fullmatch(key) for key in item):
        return _parse_rounds(item)
    return parse_alpaca(item)


def parse_camel(item: dict[str, Any]) -> Parsed:
    """`message_1` and `message_2` with a topic (whose key really is "topic;"), or the code and ai_society form."""
    if "message_1" not in item and "instruction" in item:
        return parse_alpaca(item)
    category = _category(item, "topic;") or _category(item, "topic")
    return _single([_text(item, "message_1")], _text(item, "message_2"), category)


def parse_dolly(item: dict[str, Any]) -> Parsed:
    """`instruction, context, response, category`; input and output are taken for context and response."""
    context = "input" if "input" in item and "context" not in item else "context"
    reply = "output" if "output" in item and "response" not in item else "response"
    return _single([_optional(item, context), _instruction(item)], _text(item, reply), _category(item))


def parse_alpaca(item: dict[str, Any]) -> Parsed:
    """`instruction, input, output`, and `category` where there is one."""
    prompt = [_instruction(item), _optional(item, "input")]
    return _single(prompt, _text(item, "output"), _category(item))


def parse_bilingual_en(item: dict[str, Any]) -> Parsed:
    """The English side of a translated pair: `en_instruction, en_input, en_output`."""
    return _parse_side(item, "en")


def parse_bilingual_zh(item: dict[str, Any]) -> Parsed:
    """The Chinese side of a translated pair: `zh_instruction, zh_input, zh_output`."""
    return _parse_side(item, "zh")


# What a recipe's `format` may say.
FORMATS: dict[str, Callable[[dict[str, Any]], Parsed]] = {
    "belle": parse_belle,
    "school_math": parse_belle,
    "coig": parse_coig,
    "camel": parse_camel,
    "dolly": parse_dolly,
    "alpaca": parse_alpaca,
    "alpaca_bilingual_en": parse_bilingual_en,
    "alpaca_bilingual_zh": parse_bilingual_zh,
}


def _parse_side(item: dict[str, Any], side: str) -> Parsed:
    prompt = [_instruction(item, f"{side}_instruction"), _optional(item, f"{side}_input")]
    return _single(prompt, _text(item, f"{side}_output"))


def _parse_rounds(item: dict[str, Any]) -> Parsed:
    """COIG's counterfactual correction: `round_0`, `round_1`... each with a JSON string {"Q", "A"} as `response`."""
    numbers = sorted(int(match[1]) for match in map(_ROUND.fullmatch, item) if match)
    turns = []
    for number in numbers:
        key = f"round_{number}"
        pair = _round_pair(item[key], key)
        turns.append(("user", _text(pair, "Q", f"{key}.response.Q")))
        turns.append(("assistant", _text(pair, "A", f"{key}.response.A")))
    return _dialogue(turns, "round")


def _round_pair(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord(f"field {key} is {kind(value)}, not an object")
    response = value.get("response")
    if isinstance(response, str):
        try:
            response = DECODER.decode(response)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"field {key}.response holds broken JSON: {error}") from error
    if not isinstance(response, dict):
        raise BadRecord(f"field {key}.response is {kind(response)}, not a JSON string of Q and A")
    return response


def _turn(turn: Any, i: int) -> tuple[str, str]:
    where = f"conversations[{i}]"
    if not isinstance(turn, dict):
        raise BadRecord(f"field {where} is {kind(turn)}, not an object")
    name = _text(turn, "from", f"{where}.from")
    role = _ROLES.get(name.lower())
    if role is None:
        raise BadRecord(f"field {where}.from is {name[:40]!r}, not human or assistant")
    return role, _text(turn, "value", f"{where}.value")


def _dialogue(turns: list[tuple[str, str]], field: str) -> Parsed:
    """Splits turns at the last assistant turn; they must alternate, after a system turn if there is one."""
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise BadRecord(f"field {field} has no assistant turn")
    offset = 1 if turns[0][0] == "system" else 0
    for i, (role, content) in enumerate(turns[: last + 1]):
        expected = "system" if i < offset else ("user", "assistant")[(i - offset) % 2]
        if role != expected:
            raise BadRecord(f"field {field}: turn {i + 1} is of the {role}, expected the {expected}")
        if i < last and not content.strip():
            raise BadRecord(f"empty prompt: turn {i + 1} of {field} has no text")
    messages = [{"role": role, "content": content.strip("\r\n")} for role, content in turns[: last + 1]]
    return Parsed(messages[:-1], messages[-1]["content"])


def _single(parts: list[str], reply: str, category: str | None = None) -> Parsed:
    """A prompt of one user turn, its parts that hold any text joined by a line break."""
    content = "\n".join(part.strip("\r\n") for part in parts if part and not part.isspace())
    return Parsed([{"role": "user", "content": content}], reply.strip("\r\n"), category)


def _instruction(item: dict[str, Any], key: str = "instruction") -> str:
    """The instruction itself, without which an input is no prompt."""
    text = _text(item, key)
    if not text or text.isspace():
        raise BadRecord(f"empty prompt: field {key} has no text")
    return text


def _items(item: dict[str, Any], key: str) -> list[Any]:
    value = item[key]
    if not isinstance(value, list):
        raise BadRecord(f"field {key} is {kind(value)}, not a list")
    return value


def _text(item: Any, key: str, name: str | None = None) -> str:
    """A field that must be there and hold text. `name` is what an error calls it."""
    if not isinstance(item, dict):
        raise BadRecord(f"field {name or key} has no object around it")
    if key not in item:
        raise BadRecord(f"field {name or key} is missing")
    value = item[key]
    if not isinstance(value, str):
        raise BadRecord(f"field {name or key} is {kind(value)}, not text")
    return value


def _optional(item: dict[str, Any], key: str) -> str:
    """A field that may be absent or null, and else holds text."""
    return "" if item.get(key) is None else _text(item, key)


def _category(item: dict[str, Any], key: str = "category") -> str | None:
    return _optional(item, key).strip() or None


def kind(value: Any) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    if isinstance(value, Malformed):
        return f"malformed ({value.reason})"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    names |= {Decimal: "a number", bytes: "bytes"}  # as Parquet has them
    return names.get(type(value), "a date, a time or another value that JSON has not")
