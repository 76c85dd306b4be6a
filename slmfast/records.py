"""What a record is: its Arrow schema, its id, and the two side tables that account for every row not kept.

One schema runs through the whole pipeline. Later stages append columns and never rewrite earlier ones.
"""

import hashlib
import json.encoder
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])

RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # 32 hex digits, see record_id
        pa.field("source", pa.string(), nullable=False),  # the recipe's name for where it came from
        pa.field("source_row", pa.int64(), nullable=False),  # 0-based number of the record in its source
        pa.field("language", pa.string(), nullable=False),  # zh, en or other
        pa.field("source_category", pa.string()),  # what the source itself says, if anything
        pa.field("prompt", pa.list_(MESSAGE), nullable=False),  # every turn before the last assistant turn
        pa.field("reply", pa.string(), nullable=False),  # the last assistant turn
    ]
)

DROPPED_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_row", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("duplicate_of", pa.string()),  # for a duplicate: the id of the row that stands for it
        pa.field("distance", pa.uint8()),  # for a duplicate: the Hamming distance of the two fingerprints
    ]
)

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field(
            "line", pa.int64(), nullable=False
        ),  # 1-based; in a JSON array the element's number, in Parquet the row's
        pa.field("reason", pa.string(), nullable=False),
    ]
)


_quoted = json.encoder.encode_basestring  # as json.dumps writes a string with ensure_ascii=False


def record_id(source: str, prompt: Sequence[dict[str, str]], reply: str) -> str:
    """A stable 128-bit id in hex of a record's source and content.

    The same content from the same source has the same id on every machine and in every run.
    """
    # The same text as json.dumps([source, [[role, content], ...], reply], ensure_ascii=False), in a third of its time.
    turns = ", ".join([f"[{_quoted(m['role'])}, {_quoted(m['content'])}]" for m in prompt])
    content = f"[{_quoted(source)}, [{turns}], {_quoted(reply)}]"
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def prompt_text(prompt: Sequence[dict[str, str]]) -> str:
    """All turns of a prompt as one text: what is hashed, labelled and judged.

    A single turn is its content alone; of several, each begins with its role.
    """
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def prompt_texts(prompts: pa.ListArray) -> pa.LargeStringArray:
    """prompt_text of every prompt of a column, without a Python object a row."""
    turns = prompts.flatten()
    roles, contents = (pc.struct_field(turns, name).cast(pa.large_string()) for name in ("role", "content"))
    counts = prompts.value_lengths()
    alone = pc.equal(counts, 1).take(pc.list_parent_indices(prompts))
    lines = pc.if_else(
        alone, contents, pc.binary_join_element_wise(roles, contents, pa.scalar(": ", pa.large_string()))
    )
    ends = np.cumsum(counts.to_numpy(), dtype=np.int64)
    return pc.binary_join(pa.LargeListArray.from_arrays(np.append(0, ends), lines), pa.scalar("\n", pa.large_string()))


def conversation(prompt: Sequence[dict[str, str]], reply: str) -> list[dict[str, str]]:
    """The whole conversation, the reply as its last turn."""
    return [*prompt, {"role": "assistant", "content": reply}]
