"""A program that tells a digest of the bytes of every answer of the near-duplicate room, as one line of JSON.

    python near_duplicate_digests.py ROWS THREADS...

{"isa", "pairs", "digests": {threads: {name: SHA-256}}}. The tests run it under forced instruction sets and emulated
processors and compare the digests.
"""

import hashlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from slmfast import DedupIndex, _native, dedup, near_pairs, simhash

ENGLISH = "the quick brown fox jumps over a lazy dog and asks seven wizards about maps".split()
CHINESE = "请用中文写一篇关于人工智能的短文章介绍它在医疗和教育领域的应用"
ODD = [None, "", "a", "ab", "好", "½ pint", "ｱｲｳﾞ", "e\u0301", "A" * 300, "\U0001f600" * 5]


def texts_in_families(count: int) -> Iterator[str | None]:
    """Texts in both languages a few edits apart, among nulls, short ones and ones that Python normalises."""
    rng = random.Random(1)
    words = [f"{word} " for word in ENGLISH] + list(CHINESE)
    bases = ["".join(rng.choices(words, k=rng.randint(2, 90))) for _ in range(count // 6)]
    for _ in range(count):
        if rng.random() < 0.1:
            yield rng.choice(ODD)
            continue
        text = rng.choice(bases)
        for _ in range(rng.randint(0, 3)):
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice("xyz的，ß") + text[place + 1 :]
        yield text


def clustered_fingerprints(count: int) -> np.ndarray:
    """Twenty rows about each centre; a third of the centres share 48 bits."""
    rng = np.random.default_rng(2)
    centres = rng.integers(0, 2**64, max(1, count // 20), dtype=np.uint64)
    centres[::3] &= np.uint64(0xFFFF)
    values = centres[rng.integers(0, len(centres), count)]
    for _ in range(6):
        values ^= (rng.random(count) < 0.5).astype(np.uint64) << rng.integers(0, 64, count, dtype=np.uint64)
    return values


def digest(*columns: np.ndarray) -> str:
    """SHA-256 of the columns' types, shapes and bytes."""
    whole = hashlib.sha256()
    for column in columns:
        whole.update(f"{column.dtype} {column.shape} ".encode() + column.tobytes())
    return whole.hexdigest()


def answers(texts: list[str | None], values: np.ndarray, threads: int) -> Iterator[tuple[str, str]]:
    """(name, digest) of simhash, near_pairs, dedup and DedupIndex."""
    column = pa.array(texts, pa.string_view())
    for ngram in (1, 3, 4, 9):
        yield f"simhash, ngram = {ngram}", digest(simhash(column, ngram=ngram, threads=threads))
    for k in range(9):
        yield f"near_pairs, k = {k}", digest(*near_pairs(values, k, threads=threads))
    for mode in ("representative", "components"):
        for k, verify in ((2, 0.9), (3, 0.8), (3, None), (8, 0.5), (8, None)):
            found = dedup(texts, k=k, verify=verify, mode=mode, threads=threads)
            name = f"dedup, {mode}, k = {k}, verify = {verify}"
            yield name, digest(found.keep, found.duplicate_of, found.distance)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kept.index")
        index = DedupIndex(path, 5)
        third = len(texts) // 3 + 1
        for start in range(0, len(texts), third):
            some = texts[start : start + third]
            found = index.add(some, range(start, start + len(some)), threads=threads)
            name = f"DedupIndex, rows from {start}"
            yield name, digest(found.keep, found.duplicate_of, found.distance)
        yield "DedupIndex, file", hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    rows, *threads = map(int, sys.argv[1:])
    texts = list(texts_in_families(rows))
    values = clustered_fingerprints(3 * rows)
    digests = {count: dict(answers(texts, values, count)) for count in threads}
    pairs = len(near_pairs(values, 8)[0])
    print(json.dumps({"isa": _native.active_isa(), "pairs": pairs, "digests": digests}))


if __name__ == "__main__":
    main()
