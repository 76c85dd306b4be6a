"""Records that no reader may accept: what each seed format's raw files hold beside good records."""

import json
from random import Random
from typing import Any

from slmfast.miniature.raw_files import FILES, Messages, render

KINDS = (
    "broken JSON",
    "wrong encoding",
    "not an object",
    "missing field",
    "wrong type",
    "empty prompt",
    "empty reply",
    "lone surrogate",
)
_ONLY_IN_LINES = ("broken JSON", "wrong encoding")  # a file that is one JSON value stays valid JSON
_REPLY_FIELDS = ("conversations", "conversation", "output", "trans_output", "response", "message_2", "round_0",
                 "textbox_answer", "textbox_answer_analysis")  # fmt: skip


def spoiled(source: str, label: str, number: int, messages: Messages, reply: str, rng: Random) -> tuple[str, bytes]:
    """The file that takes a malformed record of a source, and its bytes, by one of KINDS."""
    file, value = render(source, label, number, messages, reply)
    form = FILES[source][file]
    chinese = any("一" <= character <= "鿿" for character in messages[-1]["content"])
    kinds = [kind for kind in KINDS if form == "lines" or kind not in _ONLY_IN_LINES]
    kind = rng.choice([kind for kind in kinds if chinese or kind != "wrong encoding"])
    if kind == "empty prompt":
        value = render(source, label, number, [*messages[:-1], {"role": "user", "content": " "}], reply)[1]
    elif kind == "empty reply":
        value = render(source, label, number, messages, "")[1]
    elif kind == "lone surrogate":
        value = render(source, label, number, messages, reply + "\ud83d")[1]
        return file, json.dumps(value).encode()
    elif kind == "not an object":
        return file, json.dumps(reply, ensure_ascii=False).encode()
    elif kind in ("missing field", "wrong type"):
        value = _without_reply(value, kind)
    text = json.dumps(value, ensure_ascii=False)
    if kind == "broken JSON":
        text = text[: len(text) * 2 // 3]
    return file, text.encode("gb18030" if kind == "wrong encoding" else "utf-8")


def _without_reply(value: dict[str, Any], kind: str) -> dict[str, Any]:
    """The record with the fields of its reply gone, or holding a number."""
    if kind == "missing field":
        return {key: field for key, field in value.items() if key not in _REPLY_FIELDS}
    return {key: 12345 if key in _REPLY_FIELDS else field for key, field in value.items()}
