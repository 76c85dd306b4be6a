"""From Parquet in TRL's format to token ids, groups and the order of the epochs.

Groups are formed once, of neighbouring rows; an epoch permutes groups and never rows, so that a
group's KL pairs and reference log-probabilities stay true for the whole run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.errors import UserError
from slmfast.store import digest, file_digest
from slmfast.training.settings import TrainSettings

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class TokenSet:
    """The rows of a training set as token ids, with what was left out."""

    prompts: list[np.ndarray]  # int32 ids of the rendered prompt, the generation prompt included
    completions: list[np.ndarray]  # int32 ids of the rest: the reply, its closing token and newline
    labels: np.ndarray | None  # bool, KTO's: is the reply desirable?
    skipped: int  # rows over the window, left out because the settings say so

    def __len__(self) -> int:
        return len(self.prompts)

    def length(self, prompt: int, completion: int) -> int:
        """The tokens of the pair of one row's prompt and another's, or the same row's, completion."""
        return len(self.prompts[prompt]) + len(self.completions[completion])

    def keep(self, rows: Sequence[int]) -> "TokenSet":
        """These rows alone; the others count as skipped."""
        return TokenSet(
            [self.prompts[row] for row in rows],
            [self.completions[row] for row in rows],
            None if self.labels is None else self.labels[list(rows)],
            self.skipped + len(self) - len(rows),
        )


def dataset_files(path: Path) -> list[Path]:
    """The Parquet files of a set: the file itself, or those of a folder in order."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{path} holds no Parquet files: give a .parquet file or a folder of them")
    return files


def dataset_digest(path: Path) -> str:
    """A hash of a set's rows as they lie on the disk."""
    return digest([file_digest(file) for file in dataset_files(path)])


def load_tokens(path: Path, tokenizer: Any, settings: TrainSettings) -> TokenSet:
    """Reads and tokenises a set. The window is the settings' `max_length`.

    Raises:
        UserError: a column is missing or mistyped, a prompt or completion is empty, a row is over the window and
            `too_long` is "refuse", KTO's set lacks one class, or nothing is left.
    """
    prompts, completions, labels, skipped = [], [], [], 0
    for number, row in enumerate(_rows(path, settings.method)):
        where = f"{path} row {number}"
        prompt, completion = tokenize(tokenizer, row["prompt"], row["completion"], where)
        if len(prompt) + len(completion) > settings.max_length:
            _refuse_long(where, len(prompt) + len(completion), settings)
            skipped += 1
            continue
        prompts.append(np.array(prompt, dtype=np.int32))
        completions.append(np.array(completion, dtype=np.int32))
        labels.append(_label(row, where) if settings.method == "kto" else None)
    tokens = TokenSet(prompts, completions, np.array(labels, dtype=bool) if settings.method == "kto" else None, skipped)
    if settings.takes_pairs:
        tokens = _fit_pairs(tokens, path, settings)
    _check_whole(tokens, path, settings)
    return tokens


def _rows(path: Path, method: str) -> Iterator[dict[str, Any]]:
    wanted = ["prompt", "completion"] + (["label"] if method == "kto" else [])
    for file in dataset_files(path):
        try:
            parquet = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file} can't be read as Parquet ({error}): give a whole Parquet file") from error
        with parquet:
            missing = [column for column in wanted if column not in parquet.schema_arrow.names]
            if missing:
                raise UserError(f"{file} has no column {missing[0]!r}: a {method} set has {', '.join(wanted)}")
            if method == "sft":
                _refuse_judged(file, parquet.schema_arrow)
            for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted):
                yield from batch.to_pylist()


def _refuse_judged(file: Path, schema: pa.Schema) -> None:
    """Refuses to imitate a KTO set: SFT would train on its bad replies as on its good ones."""
    if "label" in schema.names and pa.types.is_boolean(schema.field("label").type):
        raise UserError(
            f"{file} has a column of true and false labels, as a KTO set has: train kto, or write the rows to imitate "
            "without that column"
        )


def tokenize(tokenizer: Any, prompt: Any, completion: Any, where: str = "a row") -> tuple[list[int], list[int]]:
    """The ids of a rendered prompt and those of the rest of the conversation.

    The completion is what the chat template writes after the generation prompt (for Qwen2 the reply, `<|im_end|>` and
    a newline, as TRL labels it). The two are tokenised apart, as in scoring, so that no token straddles them.

    Raises:
        UserError: the row is no pair of message lists, a side is empty, or the template breaks the prefix law.
    """
    if not _messages(prompt):
        raise UserError(f"{where}: the prompt is not a list of {{role, content}} messages: write it as such a list")
    if not _messages(completion) or not completion[0]["content"].strip():
        raise UserError(f"{where}: the completion is empty or not a list of messages: leave such rows out")
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    if not whole.startswith(start):
        raise UserError(f"{where}: the chat template renders a prompt otherwise before a reply: mend the template")
    sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole[len(start) :])]
    return sides[0], sides[1]


def _messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
    )


def _label(row: dict[str, Any], where: str) -> bool:
    if row["label"] not in (0, 1):  # True and False are 1 and 0
        raise UserError(f"{where}: the label is {row['label']!r}: KTO takes true or false")
    return bool(row["label"])


def _refuse_long(where: str, length: int, settings: TrainSettings) -> None:
    if settings.too_long == "refuse":
        raise UserError(
            f"{where} has {length} tokens, over the window of {settings.max_length} (max_length, or the model's "
            "positions where these are fewer): raise max_length if that is it, or set too_long to skip"
        )


def _fit_pairs(tokens: TokenSet, path: Path, settings: TrainSettings) -> TokenSet:
    """Leaves out rows until every mismatched pair fits the window as well; no pair is ever cut."""
    while True:
        long = []
        for group in make_groups(len(tokens), settings.batch_size):
            for row, other in zip(group, rotated(group), strict=True):
                length = tokens.length(row, other)
                if length > settings.max_length:
                    _refuse_long(f"{path}: the KL pair of kept rows {row} and {other}", length, settings)
                    long.append(row)
        if not long:
            return tokens
        tokens = tokens.keep(sorted(set(range(len(tokens))) - set(long)))


def _check_whole(tokens: TokenSet, path: Path, settings: TrainSettings) -> None:
    if not len(tokens):
        reason = f"all {tokens.skipped} are over the window: raise max_length" if tokens.skipped else "it has none"
        raise UserError(f"{path} leaves no row to train on: {reason}")
    if settings.method == "kto":
        if tokens.labels.all() or not tokens.labels.any():
            lacking = "undesirable" if tokens.labels.all() else "desirable"
            raise UserError(f"{path} has no {lacking} reply: a KTO set needs both labels")


def make_groups(rows: int, size: int) -> list[range]:
    """Neighbouring rows in groups of `size`; a last group of one joins the group before it."""
    groups = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [range(groups[-2].start, rows)]
    return groups


def rotated(group: Sequence[int]) -> list[int]:
    """For each row of a group the row whose completion its prompt is paired with: the one before it, in a ring."""
    return [group[-1], *group[:-1]]


def longest_sequence(tokens: TokenSet, groups: Sequence[Sequence[int]], takes_pairs: bool) -> int:
    """The most tokens that a sequence of these groups has, with `takes_pairs` the mismatched ones included."""
    rows = [row for group in groups for row in group]
    others = [row for group in groups for row in rotated(group)] if takes_pairs else []
    pairs = [*zip(rows, rows, strict=True), *zip(rows, others, strict=bool(others))]
    return max(tokens.length(row, other) for row, other in pairs)


class StepOrder:
    """Which groups a step trains on: a pure function of the seed and the step's number.

    The first epoch keeps the file's order, later ones are permuted. An epoch's last step may be short; it never
    borrows from the next epoch.
    """

    def __init__(self, groups: int, accumulation: int, epochs: int, seed: int):
        self.groups, self.accumulation, self.seed = groups, accumulation, seed
        self.steps_per_epoch = math.ceil(groups / accumulation)
        self.steps = self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(self.groups)
        if epoch > 0:
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(order)
        return order[within * self.accumulation : (within + 1) * self.accumulation]
