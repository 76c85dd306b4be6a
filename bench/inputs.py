"""What is measured: fingerprints, uniform and adversarial, and texts, real and made. All are functions of a seed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Draw = Callable[[int, int], np.ndarray]  # (n, seed) -> distinct fingerprints, uint64

BATCH = 1_000_000  # short texts made at a time
POOL = 200_000  # pieces that short texts are made of
ENDINGS = ("", ".", "?", "。", "？")


def uniform(n: int, seed: int) -> np.ndarray:
    """Distinct random fingerprints, with a near neighbour for one row in a thousand so that there are pairs to find."""
    return _with_neighbours(n, seed, rows=1000)


def one_row_in_ten_near(n: int, seed: int) -> np.ndarray:
    """As uniform, but with a near neighbour for one row in ten: as many pairs as a corpus full of copies has."""
    return _with_neighbours(n, seed, rows=10)


def _with_neighbours(n: int, seed: int, *, rows: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2**64, n, dtype=np.uint64)
    copies = rng.integers(0, n, n // rows)
    values[: len(copies)] = values[copies] ^ (np.uint64(1) << rng.integers(0, 64, len(copies), dtype=np.uint64))
    return _distinct(values, rng)


def halves(n: int, seed: int) -> np.ndarray:
    """1 % of the rows agree on 32 neighbouring bits: one template, on two whole blocks of 16."""
    return _templates(n, seed, free=[range(32)], templates=1)


def three_blocks(n: int, seed: int) -> np.ndarray:
    """1 % of the rows come from templates; each agrees with its own on three blocks of 16 and is random on one."""
    return _templates(n, seed, free=[range(16 * b, 16 * b + 16) for b in range(4)], templates=max(1, n // 50_000))


def three_blocks_of_one(n: int, seed: int) -> np.ndarray:
    """As three_blocks, but all 1 % come from one template: so many pairs that the join waits for its own output."""
    return _templates(n, seed, free=[range(16 * b, 16 * b + 16) for b in range(4)], templates=1)


def twenty_bits(n: int, seed: int) -> np.ndarray:
    """1 % of the rows differ in the 20 lowest bits only."""
    return _templates(n, seed, free=[range(20)], templates=1)


def every_other_bit(n: int, seed: int) -> np.ndarray:
    """1 % of the rows agree on every other bit, so that any run of bits says half of what it should."""
    return _templates(n, seed, free=[range(0, 64, 2)], templates=1)


def few_bits(n: int, seed: int) -> np.ndarray:
    """1 % of the rows differ in 24 bits only, which lie scattered over the word."""
    places = np.random.default_rng(seed + 1).permutation(64)[:24]
    return _templates(n, seed, free=[places.tolist()], templates=1)


ADVERSARIAL: tuple[Draw, ...] = (halves, three_blocks, three_blocks_of_one, every_other_bit, few_bits, twenty_bits)


def _templates(n: int, seed: int, *, free: list, templates: int) -> np.ndarray:
    """As uniform, but 1 % of the rows equal a template except in one of the sets of free bits."""
    values = uniform(n, seed)
    rng = np.random.default_rng(seed + 2)
    count = len(values) // 100
    masks = np.array([sum(1 << int(bit) for bit in bits) for bits in free], dtype=np.uint64)
    origin = rng.integers(0, 2**64, templates, dtype=np.uint64)[rng.integers(0, templates, count)]
    mask = masks[rng.integers(0, len(masks), count)]
    values[:count] = origin & ~mask | values[:count] & mask
    return _distinct(values, rng)


def _distinct(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values = np.unique(values)
    return values[rng.permutation(len(values))]


def data_folder() -> Path | None:
    """Where real data lies: $SLMFAST_DATA, or shared/data beside the checkout; None without it."""
    named = os.environ.get("SLMFAST_DATA")
    folder = Path(named) if named else Path(__file__).parent.parent.parent / "shared" / "data"
    return folder if (folder / "alpaca-bilingual-52k").is_dir() else None


def prompts() -> tuple[str, list[str]]:
    """(what they are, the texts): the bilingual Alpaca prompts, or those of the miniature where no data is there."""
    folder = data_folder()
    if folder is None:
        return "miniature prompts", miniature_prompts(20_000)
    texts = []
    for part in sorted((folder / "alpaca-bilingual-52k").glob("*.json")):
        for item in json.loads(part.read_text(encoding="utf-8")):
            texts += [_joined(item[f"{side}_instruction"], item[f"{side}_input"]) for side in ("en", "zh")]
    return "bilingual Alpaca", texts


def belle_prompts() -> list[str]:
    """BELLE's Chinese prompts; none where no data is there."""
    folder = data_folder()
    texts = []
    for name in ("dev1K.jsonl", "eval_set_1k.jsonl") if folder else ():
        for line in (folder / "belle" / name).read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            texts.append(item["question"] if "question" in item else _joined(item["instruction"], item["input"]))
    return texts


def miniature_prompts(count: int) -> list[str]:
    """Questions in Chinese and English from the miniature's grammar, some behind a long story."""
    from slmfast.miniature.skills import SKILLS, draw_item
    from slmfast.miniature.stories import story

    rng = Random(0)
    names = list(SKILLS)
    texts = []
    for row in range(count):
        language = ("en", "zh")[row % 2]
        item = draw_item(rng.choice(names), language, rng)
        texts.append(story(language, rng) + item.question if row % 5 == 0 else item.question)
    return texts


def _joined(instruction: str, passage: str | None) -> str:
    return f"{instruction}\n{passage}" if passage and not passage.isspace() else instruction


def short_texts(n: int, seed: int) -> pa.ChunkedArray:
    """n texts of about 12 to 60 characters in both languages, made of two pieces of the real prompts each.

    One in ten is a near copy of a text before it: other capitals, another closing mark, or both.
    """
    pieces = _pieces(prompts()[1], seed)
    batches = (min(BATCH, n - begin) for begin in range(0, n, BATCH))
    return pa.chunked_array([_short_batch(count, (seed, i), pieces) for i, count in enumerate(batches)], pa.string())


def _pieces(texts: list[str], seed: int) -> pa.Array:
    """POOL pieces: runs of 3 to 5 English words, and after them runs of 6 to 14 Chinese characters, as many."""
    rng = np.random.default_rng(seed)
    chinese = [any("\u4e00" <= character <= "\u9fff" for character in text[:20]) for text in texts]
    words = [word for text, zh in zip(texts, chinese, strict=True) if not zh for word in text.split() if len(word) < 14]
    flat = "".join("".join(text.split()) for text, zh in zip(texts, chinese, strict=True) if zh)
    half = POOL // 2
    begins, counts = rng.integers(0, len(words) - 5, half), rng.integers(3, 6, half)
    english = [" ".join(words[b : b + c]) + " " for b, c in zip(begins.tolist(), counts.tolist(), strict=True)]
    begins, counts = rng.integers(0, len(flat) - 14, half), rng.integers(6, 15, half)
    return pa.array(english + [flat[b : b + c] for b, c in zip(begins.tolist(), counts.tolist(), strict=True)])


def _short_batch(count: int, seed: tuple[int, int], pieces: pa.Array) -> pa.Array:
    rng = np.random.default_rng(seed)
    half = POOL // 2
    language = rng.integers(0, 2, count)
    first, second = (rng.integers(0, half, count) + language * half for _ in range(2))
    ending = rng.integers(0, len(ENDINGS), count)
    capitals = np.zeros(count, dtype=bool)
    copies = np.flatnonzero(rng.random(count) < 0.1)
    copies = copies[copies > 0]
    originals = rng.integers(0, copies)
    first[copies], second[copies] = first[originals], second[originals]
    capitals[copies] = rng.random(len(copies)) < 0.5
    texts = pc.binary_join_element_wise(
        pieces.take(pa.array(first)), pieces.take(pa.array(second)), pa.array(ENDINGS).take(pa.array(ending)), ""
    )
    return pc.if_else(pa.array(capitals), pc.utf8_upper(texts), texts)
