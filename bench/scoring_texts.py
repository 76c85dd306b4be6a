"""The prompts and replies that are scored: real ones in English and Chinese, or the miniature's where no data is.

A row of the bilingual Alpaca set gives its instruction and its own reply; the further replies are those of other rows
of the same language whose lengths are nearest to it.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from inputs import data_folder

from slmfast.errors import UserError

LANGUAGES = ("en", "zh")
PARTS = 4  # files of 1,000 rows that are read at a time: 8,000 prompts to choose from
LONGEST = 512  # tokens of a prompt and a reply; the full logits of 16 such sequences take 5 GB in fp32
LONG = (120, 400)  # tokens of a prompt, template included
SHORT = (28, 42)


@dataclass(frozen=True)
class Exchange:
    """A prompt with one reply, of one language."""

    language: str
    prompt: str
    reply: str


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt as the template renders it, and of a reply with its closing token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class TextSet:
    """Prompts, several replies to each, and the token ids of them."""

    source: str
    lengths: tuple[int, int]
    """The fewest and the most tokens that a prompt may have."""
    prompts: list[str]
    replies: list[list[str]]
    pairs: list[list[Pair]]

    @classmethod
    def of_document(cls, document: dict[str, Any]) -> "TextSet":
        """From what `dataclasses.asdict` made of a set, after JSON."""
        pairs = [
            [Pair(tuple(p["context"]), tuple(p["continuation"])) for p in several] for several in document["pairs"]
        ]
        return cls(document["source"], tuple(document["lengths"]), document["prompts"], document["replies"], pairs)

    def flat(self) -> list[Pair]:
        """All pairs in the order of `slmfast.perplexity`'s rows."""
        return [pair for several in self.pairs for pair in several]

    def sample(self, count: int) -> "TextSet":
        """So many prompts, of lengths that lie evenly in those of all, replies counted."""
        order = sorted(range(len(self.pairs)), key=lambda i: (sum(map(len, self.pairs[i])), i))
        chosen = sorted(order[int((i + 0.5) * len(order) / count)] for i in range(count))
        prompts, replies, pairs = ([of[i] for i in chosen] for of in (self.prompts, self.replies, self.pairs))
        return TextSet(self.source, self.lengths, prompts, replies, pairs)

    def shortest(self) -> "TextSet":
        """The prompt of the fewest tokens, with its first reply alone."""
        i = min(range(len(self.pairs)), key=lambda i: len(self.pairs[i][0]))
        return TextSet(self.source, self.lengths, [self.prompts[i]], [self.replies[i][:1]], [self.pairs[i][:1]])

    def described(self) -> str:
        """How many there are and how long: means, in tokens."""
        flat = self.flat()
        prompt = sum(len(several[0].context) for several in self.pairs) / len(self.pairs)
        reply = sum(len(pair.continuation) for pair in flat) / len(flat)
        prompts = f"{len(self.pairs)} prompt{'s' * (len(self.pairs) > 1)} of {prompt:.0f} tokens"
        return f"{prompts}, {len(self.pairs[0])} replies each of {reply:.0f}"


def exchanges(seed: int) -> tuple[str, Iterator[list[Exchange]]]:
    """(what they are, the exchanges some files at a time): bilingual Alpaca, or the miniature's without data."""
    folder = data_folder()
    if folder is None:
        return "miniature texts", iter([_made_up(2000, seed)])
    parts = sorted((folder / "alpaca-bilingual-52k").glob("*.json"))
    Random(seed).shuffle(parts)
    return "bilingual Alpaca", (_read(parts[at : at + PARTS]) for at in range(0, len(parts), PARTS))


def _read(parts: list[Path]) -> list[Exchange]:
    found = []
    for part in parts:
        for row in json.loads(part.read_text(encoding="utf-8")):
            for language in ("en", "zh"):
                instruction, passage, reply = (row[f"{language}_{name}"] for name in ("instruction", "input", "output"))
                if isinstance(reply, str) and reply.strip():
                    found.append(Exchange(language, f"{instruction}\n{passage}" if passage else instruction, reply))
    return found


def _made_up(count: int, seed: int) -> list[Exchange]:
    """Questions and answers from the miniature's grammar; every other one stands behind stories."""
    from slmfast.miniature.skills import SKILLS, draw_item
    from slmfast.miniature.stories import story

    rng = Random(seed)
    names = list(SKILLS)
    found = []
    for row in range(count):
        language = ("en", "zh")[row % 2]
        item = draw_item(rng.choice(names), language, rng)
        before = "".join(story(language, rng) for _ in range(2)) if row % 4 < 2 else ""
        reply = item.answer if row % 3 == 0 else f"{item.answer} {story(language, rng)}"
        found.append(Exchange(language, before + item.question, reply))
    return found


class Drawer:
    """Draws sets from exchanges that are tokenised once, and read as far as a draw needs them."""

    def __init__(self, tokenizer: Any, seed: int):
        self.source, self._unread = exchanges(seed)
        self._seed, self._tokenizer = seed, tokenizer
        self._rows: list[Exchange] = []
        self._contexts: list[tuple[int, ...]] = []
        self._continuations: list[tuple[int, ...]] = []
        self._ends: list[int] = []  # how many rows there were after each reading

    def _read_more(self) -> bool:
        rows = next(self._unread, None)
        if rows is None:
            return False
        closing = closing_token(self._tokenizer)
        contexts = token_ids(self._tokenizer, [rendered(self._tokenizer, row.prompt) for row in rows])
        replies = token_ids(self._tokenizer, [row.reply for row in rows])
        self._rows += rows
        self._contexts += [tuple(ids) for ids in contexts]
        self._continuations += [(*ids, closing) for ids in replies]
        self._ends.append(len(self._rows))
        return True

    def _able(self, prompts: int, lengths: tuple[int, int]) -> tuple[int, dict[str, list[int]]]:
        """How many rows hold enough prompts of such lengths, and which these are, by language.

        What was read for another draw does not count: a draw is a function of the seed and its own arguments.
        """
        for reading in itertools.count():
            if reading == len(self._ends) and not self._read_more():
                break
            end = self._ends[reading]
            able = {
                language: [i for i in range(end) if self._rows[i].language == language and self._fits(i, lengths)]
                for language in LANGUAGES
            }
            if all(len(able[language]) >= _wanted(prompts, language) for language in LANGUAGES):
                return end, able
        language = min(LANGUAGES, key=lambda language: len(able[language]))
        raise UserError(
            f"{self.source} holds {len(able[language])} prompts of {lengths[0]} to {lengths[1]} tokens in {language}, "
            f"and {_wanted(prompts, language)} are wanted: give a smaller --prompts"
        )

    def draw(self, prompts: int, replies: int, lengths: tuple[int, int]) -> TextSet:
        """A set whose prompts have so many tokens; half of them are Chinese.

        Raises:
            UserError: there are not so many.
        """
        rng = Random(f"{self._seed} {lengths}")
        end, able = self._able(prompts, lengths)
        chosen = [rng.sample(able[language], _wanted(prompts, language)) for language in LANGUAGES]
        order = [row for number in range(prompts) for row in chosen[number % 2][number // 2 : number // 2 + 1]]
        groups = [[row, *self._like(row, replies - 1, end)] for row in order]
        return TextSet(
            self.source,
            lengths,
            [self._rows[row].prompt for row in order],
            [[self._rows[i].reply for i in group] for group in groups],
            [[Pair(self._contexts[group[0]], self._continuations[i]) for i in group] for group in groups],
        )

    def _fits(self, row: int, lengths: tuple[int, int]) -> bool:
        context = len(self._contexts[row])
        return lengths[0] <= context <= lengths[1] and context + len(self._continuations[row]) <= LONGEST

    def _like(self, row: int, count: int, end: int) -> list[int]:
        """Others of the first `end` rows, of the same language with other replies, whose lengths are nearest."""
        own, room = len(self._continuations[row]), LONGEST - len(self._contexts[row])
        taken, found = {self._rows[row].reply}, []
        for i in sorted(range(end), key=lambda i: (abs(len(self._continuations[i]) - own), i)):
            other = self._rows[i]
            fits = len(self._continuations[i]) <= room
            if other.language == self._rows[row].language and other.reply not in taken and fits:
                taken.add(other.reply)
                found.append(i)
            if len(found) == count:
                break
        return found


def _wanted(prompts: int, language: str) -> int:
    return (prompts + (language == LANGUAGES[0])) // 2


def rendered(tokenizer: Any, prompt: str) -> str:
    """A prompt as one user turn of the chat template, with the generation prompt."""
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def closing_token(tokenizer: Any) -> int:
    """What ends a reply: ChatML's <|im_end|> where the tokenizer has it, as Qwen2's does, else its eos token."""
    return tokenizer.get_vocab().get("<|im_end|>", tokenizer.eos_token_id)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, no special token added.

    Rendering and ids are not taken from slmfast.scoring, so that the peers' scores also check our tokens.
    """
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
