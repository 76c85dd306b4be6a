"""One record as it stands in each of the six seed formats.

A format's function gives the file that takes the record and the JSON value; it keeps the text of every turn as it is,
whichever fields the text is spread over. Schemas: the dataset cards of BELLE, COIG, CAMEL, Dolly and Alpaca-GPT4.
"""

import json
from collections.abc import Callable
from typing import Any

Messages = list[dict[str, str]]
Rendered = tuple[str, dict[str, Any]]

# source -> its files in the order in which they are read, with their form; sources in the recipe's order of priority
FILES: dict[str, dict[str, str]] = {
    "alpaca_gpt4_zh": {"alpaca_gpt4/alpaca_gpt4_data_zh.json": "array"},
    "alpaca_gpt4_en": {"alpaca_gpt4/alpaca_gpt4_data_en.json": "array"},
    "dolly": {"dolly/databricks-dolly-15k.jsonl": "lines"},
    "camel": {"camel/code.json": "array", "camel/math.json": "array"},
    "coig": {
        "coig/counterfactural_correction_multi_round_chat.tar.gz": "tar",
        "coig/exam_instructions.jsonl": "lines",
        "coig/human_value_alignment_instructions_part1.json": "array",
        "coig/human_value_alignment_instructions_part2.json": "lines",
        "coig/leetcode_instructions.jsonl": "lines",
        "coig/translated_instructions.jsonl": "lines",
    },
    "school_math": {"belle/school_math_0.25M.json": "lines"},
    "belle": {"belle/train_3.5M_CN.jsonl": "lines"},
}

# source -> its language and its weight among the sources of that language
SOURCES: dict[str, tuple[str, float]] = {
    "alpaca_gpt4_zh": ("zh", 0.24),
    "alpaca_gpt4_en": ("en", 0.42),
    "dolly": ("en", 0.36),
    "camel": ("en", 0.22),
    "coig": ("zh", 0.26),
    "school_math": ("zh", 0.2),
    "belle": ("zh", 0.38),
}

_DOLLY_CATEGORIES = {"Translation": "closed_qa", "Knowledge": "classification", "Life": "brainstorming"}


def render(source: str, label: str, number: int, messages: Messages, reply: str) -> Rendered:
    """The file that takes a record of a source, and the record's JSON value. `number` makes ids and varies the form."""
    return _RENDERERS[source](label, number, messages, reply)


def _belle(label: str, number: int, messages: Messages, reply: str) -> Rendered:
    names = {"user": "human", "assistant": "assistant"}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in messages]
    turns.append({"from": "assistant", "value": reply})
    return "belle/train_3.5M_CN.jsonl", {"id": f"{number:08d}", "conversations": turns}


def _school_math(label: str, number: int, messages: Messages, reply: str) -> Rendered:
    text = messages[0]["content"]
    if number % 4 == 0:
        value: dict[str, Any] = {"conversation": [{"human": text, "assistant": f"\n{reply}"}]}
    else:
        value = {"instruction": text, "input": "", "output": f"\n{reply}"}
    return "belle/school_math_0.25M.json", value


def _coig(label: str, number: int, messages: Messages, reply: str) -> Rendered:
    if len(messages) > 1:
        return "coig/counterfactural_correction_multi_round_chat.tar.gz", _rounds(messages, reply)
    text, primary = messages[0]["content"], label.split("-")[0]
    if primary == "Safety":
        if number % 2:
            return "coig/human_value_alignment_instructions_part1.json", _alpaca_fields(text, reply)
        return "coig/human_value_alignment_instructions_part2.json", _textbox(text, reply, None, number)
    if primary == "Code":
        return "coig/leetcode_instructions.jsonl", _alpaca_fields(text, reply)
    if primary == "Translation":
        fields = {f"trans_{key}": value for key, value in _alpaca_fields(text, reply).items()}
        return "coig/translated_instructions.jsonl", fields
    return "coig/exam_instructions.jsonl", _textbox(text, reply, primary, number)


def _rounds(messages: Messages, reply: str) -> dict[str, Any]:
    texts = [message["content"] for message in messages] + [reply]
    rounds = zip(texts[::2], texts[1::2], strict=True)
    return {
        f"round_{i}": {"response": json.dumps({"Q": question, "A": answer}, ensure_ascii=False)}
        for i, (question, answer) in enumerate(rounds)
    }


def _textbox(text: str, reply: str, subject: str | None, number: int) -> dict[str, Any]:
    """The analysis holds the reply where there is one, and the bare answer otherwise."""
    context, _, question = text.rpartition("\n")
    fields = {"textbox_q_instruction": "", "textbox_q_context": context, "textbox_question": question}
    answer = {"textbox_answer": reply, "textbox_answer_analysis": reply if number % 3 == 0 else ""}
    return fields | answer | ({"subject": subject} if subject else {})


def _camel(label: str, number: int, messages: Messages, reply: str) -> Rendered:
    text, (primary, secondary) = messages[0]["content"], label.split("-")
    if primary == "Code":
        return "camel/code.json", _alpaca_fields(text, reply)
    fields = {"role_1": f"{primary} student_RoleType.ASSISTANT", "topic;": primary, "sub_topic": secondary}
    return "camel/math.json", fields | {"message_1": text, "message_2": reply}


def _dolly(label: str, number: int, messages: Messages, reply: str) -> Rendered:
    context, _, instruction = messages[0]["content"].rpartition("\n")
    category = _DOLLY_CATEGORIES.get(label.split("-")[0], "closed_qa" if context else "open_qa")
    fields = {"instruction": instruction, "context": context, "response": reply, "category": category}
    return "dolly/databricks-dolly-15k.jsonl", fields


def _alpaca_fields(text: str, reply: str) -> dict[str, str]:
    """What comes after a first line is the input."""
    instruction, _, rest = text.partition("\n")
    return {"instruction": instruction, "input": rest, "output": reply}


def _alpaca(file: str) -> Callable[[str, int, Messages, str], Rendered]:
    return lambda label, number, messages, reply: (file, _alpaca_fields(messages[0]["content"], reply))


_RENDERERS: dict[str, Callable[[str, int, Messages, str], Rendered]] = {
    "belle": _belle,
    "school_math": _school_math,
    "coig": _coig,
    "camel": _camel,
    "dolly": _dolly,
    "alpaca_gpt4_en": _alpaca("alpaca_gpt4/alpaca_gpt4_data_en.json"),
    "alpaca_gpt4_zh": _alpaca("alpaca_gpt4/alpaca_gpt4_data_zh.json"),
}
