"""Throws inputs of every bad kind at slmfast._native, and checks the good ones against slow Python.

    python tests/sanitize/fuzz_native.py [--inputs N] [--seed S]

An input is one text, one Arrow chunk or one set of arrays. Whatever is wrong must come back as ValueError or TypeError;
any other exception, a wrong answer or a finding of a sanitizer ends the run with a nonzero exit code. The same seed
gives the same inputs. Each round draws the instruction set and the number of threads anew.
"""

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from slmfast import _native

sys.path.insert(0, str(Path(__file__).parents[1]))
from damaged_chunks import damage, read_slowly, utf8, whole_chunk
from test_simhash import reference_fingerprint, reference_normal_form

ALPHABETS = [
    "abcdefghijklmnop ABCDEF,.!?0123456789\n\t\0",
    "的一是在不了有和人这中大为上个国我以要他时来，。！？（）「」……、",
    "ÀÉÎõüß½²³ªΑΣΩАБвг…①℃㎏ｱﾞ가각ㄱＡＢｃ１＃İıǅﬁe\u0301\u0327\u0308\u00a0\u2011😀👍🏽\u200d\ufe0f𠀀",
    "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff",
]
POINTS = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 97)]
WILD = [-1, 9, 10, 2**31 - 1, -(2**31), 2**31, 2**63, None, 2.5, "3", b"", []]
REFUSALS = (ValueError, TypeError)
ISAS = _native.available_isas()


class Fuzzer:
    """Draws inputs from one seed and counts them by kind in `inputs`, and what became of them in `outcomes`."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.inputs: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()

    def round(self) -> None:
        """About a hundred inputs of all kinds."""
        os.environ["SLMFAST_ISA"] = self.rng.choice(ISAS)
        self.column_of_texts(self.rng.choice([1, 7, 64, 120]))
        for _ in range(24):
            self.broken_text()
        for _ in range(12):
            self.damaged_chunk()
        for _ in range(3):
            self.fingerprint_array()
            self.cluster_arrays()
            self.stored_spans()
            self.literal_rules()

    def threads(self) -> int:
        """Mostly one: under AddressSanitizer a thread costs a millisecond."""
        return self.rng.choice([0, 2, 3, 4]) if self.rng.random() < 0.1 else 1

    def text(self) -> str:
        alphabet = self.rng.choice(ALPHABETS)
        if self.rng.random() < 0.1:
            alphabet += chr(self.rng.choice(POINTS))
        length = self.rng.choice([0, 1, 2, 3, 4, 5, 8, 12, 13, 30, 70, self.rng.randrange(400)])
        if self.rng.random() < 0.0005:
            length = self.rng.randrange(300_000)
        return self.rng.randbytes(length).decode("latin-1").translate((alphabet * 256)[:256])

    def few_texts(self, count: int, *others: bytes | None) -> list[bytes | None]:
        """That many short texts, drawn from a few and the given ones: the arrays beside them are what is tried."""
        return self.rng.choices([*(self.text()[:30].encode() for _ in range(5)), *others], k=count)

    def column_of_texts(self, count: int) -> None:
        """Valid texts in every layout: fingerprints and clusters, a share of them against the oracle."""
        texts = [None if self.rng.random() < 0.05 else self.text() for _ in range(count)]
        self.inputs["texts"] += count
        ngram, threads = self.rng.randint(1, 9), self.threads()
        column = _native.Texts([whole_chunk(self.rng, [None if t is None else t.encode() for t in texts])])
        values, states = _native.fingerprints(column, False, ngram, threads)
        rows = np.flatnonzero(states == _native.FOREIGN)
        normal = [reference_normal_form(texts[row]).encode() for row in rows]
        replaced = _native.Texts([whole_chunk(self.rng, normal)])
        values[rows], states[rows] = _native.fingerprints(replaced, True, ngram, threads)
        for row in self.rng.sample(range(count), 1 + count // 40):
            if texts[row] is None or len(texts[row]) < 500:
                expected = reference_fingerprint(texts[row] or "", ngram)
                assert int(values[row]) == expected, (texts[row], ngram, hex(int(values[row])), hex(expected))
                self.outcomes["fingerprints equal to the oracle's"] += 1
        verify = self.rng.choice([None, 0.0, 0.5, 0.8, 1.0])
        k, components = self.rng.randint(0, 8), self.rng.random() < 0.5
        found = _native.cluster(
            column, replaced, rows, values, states, k, components, verify, ngram, threads, self.rng.choice([0, 1, 7])
        )
        self.check_clusters(values, *found, None if components else k)

    def check_clusters(self, values: np.ndarray, stand_in: np.ndarray, distance: np.ndarray, k: int | None) -> None:
        assert (stand_in <= np.arange(len(values))).all() and np.array_equal(stand_in[stand_in], stand_in)
        assert np.array_equal(distance, np.bitwise_count(values ^ values[stand_in]))
        assert k is None or not len(values) or distance.max() <= k
        self.outcomes["clusterings that kept the laws"] += 1

    def broken_text(self) -> None:
        """Bytes that are mostly no UTF-8: accepted exactly where Python's decoder accepts them."""
        data = utf8(self.rng, self.text)
        self.inputs["byte strings"] += 1
        try:
            expected = reference_normal_form(data.decode()) if len(data) < 4000 else None
            good = data.decode() is not None
        except UnicodeDecodeError:
            good = False
        self.outcomes["byte strings refused"] += not good
        normal = self.attempt(lambda: _native.normalise(data), good)
        assert not good or normal is None or expected is None or normal == expected, data
        column = _native.Texts([whole_chunk(self.rng, [b"", data])])
        self.attempt(lambda: _native.fingerprints(column, self.rng.random() < 0.5, 3, 1), good)

    def literal_rules(self) -> None:
        """Rules of literals that overlap and repeat, against plain search; empty ones are refused."""
        letters = self.rng.choice([b"ab", b"abc\0", "的一是ab".encode(), bytes(range(256))])
        piece = lambda least: bytes(self.rng.choices(letters, k=self.rng.randint(least, 6)))  # noqa: E731
        few = lambda most, make: [make() for _ in range(self.rng.randint(1, most))]  # noqa: E731
        least = 0 if self.rng.random() < 0.05 else 1
        rules = few(6, lambda: few(3, lambda: few(3, lambda: few(3, lambda: piece(least)))))
        good = all(literal for rule in rules for clauses in rule for clause in clauses for literal in clause)
        texts = [b"".join(few(8, lambda: piece(0))) for _ in range(self.rng.randrange(8))]
        self.inputs["sets of rules"] += 1
        found = self.attempt(lambda: _native.LiteralFilter(rules), good)
        if found is None:
            return
        offsets, numbers = found.candidates(_native.Texts([whole_chunk(self.rng, texts)]))
        for row, text in enumerate(texts):
            holds = [any(all(any(b in text for b in c) for c in clauses) for clauses in rule) for rule in rules]
            assert numbers[offsets[row] : offsets[row + 1]].tolist() == np.flatnonzero(holds).tolist(), (rules, text)

    def attempt(self, call: Callable[[], object], good: bool) -> object:
        try:
            answer = call()
        except REFUSALS as error:
            if good:
                raise AssertionError(f"refused a good input: {error}") from error
            return None
        assert good, f"took a bad input and gave {answer!r}"
        return answer

    def damaged_chunk(self) -> None:
        """A chunk with something wrong: refused, or read exactly as a careful reader in Python reads it."""
        texts = [None if self.rng.random() < 0.2 else self.text()[:60].encode() for _ in range(self.rng.randrange(7))]
        chunk = damage(self.rng, whole_chunk(self.rng, texts))
        chunks = [chunk, whole_chunk(self.rng, [b"good"])] if self.rng.random() < 0.3 else [chunk]
        self.inputs["damaged chunks"] += 1
        try:
            column = _native.Texts(chunks)
        except REFUSALS:
            self.outcomes["damaged chunks refused"] += 1
            return
        texts = [text for chunk in chunks for text in read_slowly(chunk)]
        assert len(column) == len(texts)
        try:
            values, states = _native.fingerprints(column, False, 3, self.threads())
        except ValueError:
            assert any(not _is_utf8(text) for text in texts if text is not None)
            return
        clean = _native.Texts([whole_chunk(self.rng, texts)])
        again = _native.fingerprints(clean, False, 3, 1)
        assert np.array_equal(values, again[0]) and np.array_equal(states, again[1]), chunks
        self.outcomes["damaged chunks read as the careful reader reads them"] += 1

    def values(self) -> np.ndarray:
        n = self.rng.choice([0, 1, 2, 3, 9, 64, 65, 130, 300])
        values = self.numpy.integers(0, 2**64, n, dtype=np.uint64)
        kind = self.rng.randrange(5)
        if kind == 1:
            values &= self.numpy.integers(0, 2**64, dtype=np.uint64) & np.uint64(self.rng.choice([0, 7, 0xFF00FF]))
        elif kind == 2 and n:
            values = values[self.numpy.integers(0, 1 + n // 8, n)]
            values ^= np.uint64(1) << self.numpy.integers(0, 64, n, dtype=np.uint64)
        elif kind == 3:
            values[:] = self.rng.choice([0, 1, 2**64 - 1])
        elif kind == 4:
            values >>= np.uint64(self.rng.choice([16, 48, 58]))
        return values

    def fingerprint_array(self) -> None:
        """near_pairs: all pairs by brute force, or a refusal."""
        values, k, threads = self.values(), self.rng.randint(0, 8), self.threads()
        self.inputs["fingerprint arrays"] += 1
        good = True
        if self.rng.random() < 0.2:
            good = False
            kind = self.rng.randrange(4)
            if kind == 0:
                k = self.rng.choice(WILD)
            elif kind == 1:
                threads = self.rng.choice([-1, 257, *WILD[3:]])
            elif kind == 2:
                values = values.reshape(1, -1)
            else:
                values = self.rng.choice([values.astype(np.int64), values.astype(float), values.tolist(), None])
        found = self.attempt(lambda: _native.near_pairs(values, k, threads), good)
        if good:
            distance = np.triu(np.bitwise_count(values[:, None] ^ values[None]) + 1, 1)
            i, j = np.nonzero((distance > 0) & (distance <= k + 1))
            expected = (i, j, distance[i, j] - 1)
            assert all(map(np.array_equal, found, expected)), (values, k)
            self.outcomes["near_pairs equal to brute force"] += 1

    def cluster_arrays(self) -> None:
        """cluster with arrays that need not belong together: the laws hold, or a refusal."""
        values = self.values()
        n = len(values)
        texts = self.few_texts(n, None)
        arrays: dict[str, object] = {
            "texts": _native.Texts([whole_chunk(self.rng, texts)]),
            "rows": np.flatnonzero(self.numpy.random(n) < 0.1),
            "fingerprints": values,
            "states": self.numpy.integers(0, 4, n, dtype=np.uint8),
            "k": self.rng.randint(0, 8),
            "components": self.rng.random() < 0.5,
            "verify": self.rng.choice([None, 0.0, 0.5, 1.0]),
            "ngram": self.rng.randint(1, 9),
            "threads": self.threads(),
            "pair_budget": self.rng.choice([0, 1, 50]),
        }
        replaced = self.few_texts(len(arrays["rows"]))
        arrays["replaced"] = _native.Texts([whole_chunk(self.rng, replaced)])
        self.inputs["cluster calls"] += 1
        spoiled = self.rng.random() < 0.4 and self.spoil(arrays)
        try:
            found = _native.cluster(**arrays)
        except REFUSALS:
            assert spoiled, arrays
            self.outcomes["cluster calls refused"] += 1
            return
        assert not spoiled, (spoiled, arrays)
        stand_in = found[0]
        assert (stand_in <= np.arange(n)).all() and np.array_equal(stand_in[stand_in], stand_in)
        self.outcomes["cluster calls that kept the laws"] += 1

    def stored_spans(self) -> None:
        """cluster_against and normalised over stored rows of any make: answers in range, or a refusal."""
        spans = [self.span() for _ in range(self.rng.randrange(4))]
        values = self.values()[:64]
        n = len(values)
        broken = self.rng.random() < 0.2
        texts = self.few_texts(n, *[utf8(self.rng, self.text)[:40] for _ in range(broken)])
        column, none = _native.Texts([whole_chunk(self.rng, texts)]), _native.Texts([])
        rows = np.empty(0, np.int64)
        states = self.numpy.integers(0, 4, n, dtype=np.uint8)
        verify, threads = self.rng.choice([None, 0.0, 0.8]), self.threads()
        self.inputs["stored rows"] += 1
        try:
            found = _native.cluster_against(
                spans, column, none, rows, values, states, self.rng.randint(0, 8), verify, 3, threads
            )
        except REFUSALS:
            self.outcomes["stored rows refused"] += 1
        else:
            stored = sum(len(fingerprints) for fingerprints, *_ in spans)
            assert (found[0] >= -stored).all() and (found[0] <= np.arange(n)).all()
            self.outcomes["stored rows answered in range"] += 1
        wanted = self.numpy.integers(-1 if self.rng.random() < 0.2 else 0, max(1, n), n)
        inside = not n or wanted.min() >= 0
        try:
            offsets, data = _native.normalised(column, none, rows, wanted, threads)
        except REFUSALS:
            foreign = any(_is_utf8(text) and _native.normalise(text) is None for text in texts)
            assert not inside or broken or foreign, texts
        else:
            assert inside and len(offsets) == n + 1 and offsets[-1] == len(data)

    def span(self) -> tuple:
        """Rows as an index stores them, though not always of one length, type or state."""
        values = self.values()[:64]
        texts = self.few_texts(len(values))
        states = self.numpy.integers(2, 4, len(values), dtype=np.uint8)
        kind = self.rng.random()
        if kind < 0.05:
            states = self.rng.choice([states[1:], np.append(states, states), states.astype(float), None])
        elif kind < 0.1:
            texts = self.rng.choice([texts[1:], self.few_texts(len(values), b"\xff", None)])
        elif kind < 0.15:
            values = self.rng.choice([values[None], values.astype(float), values[::2], None, 3])
        elif kind < 0.2:
            states = self.numpy.integers(0, 256, len(values), dtype=np.uint8)
        return values, states, _native.Texts([whole_chunk(self.rng, texts)])

    def spoil(self, arrays: dict[str, object]) -> str:
        """Makes one argument bad, and names it."""
        name = self.rng.choice(["rows", "fingerprints", "states", "k", "verify", "ngram", "threads"])
        value = arrays[name]
        if name in ("k", "ngram", "threads"):
            arrays[name] = self.rng.choice([value for value in WILD if name != "threads" or value not in (9, 10)])
            if name == "ngram" and arrays[name] == 9:
                arrays[name] = 0
        elif name == "verify":
            arrays[name] = self.rng.choice([-0.1, 1.1, float("nan"), float("inf"), "0.8"])
        elif name == "states":
            wrong = [np.append(value, np.uint8(3)), value.astype(np.int64), np.append(value[1:], np.uint8(4))]
            arrays[name] = self.rng.choice([*wrong, np.append(value[1:], np.uint8(255)), None])
        elif name == "fingerprints":
            arrays[name] = self.rng.choice([np.append(value, np.uint64(0)), value[None], value.astype(np.int64), 5])
        else:
            wild = self.rng.choice([[-1], [len(arrays["fingerprints"])], [2**63 - 1], [0, 0], [3, 1], [-(2**63)]])
            arrays[name] = np.concatenate([value, np.array(wild)])
            arrays["replaced"] = _native.Texts([whole_chunk(self.rng, [b"x"] * len(arrays[name]))])
        return name


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    print(f"fuzzing {_native.__file__} on {', '.join(ISAS)}, seed {settings.seed}", flush=True)
    fuzzer = Fuzzer(settings.seed)
    told = 0
    while (done := fuzzer.inputs.total()) < settings.inputs:
        fuzzer.round()
        if done // 100_000 > told:
            told = done // 100_000
            print(f"{done:,} inputs", flush=True)
    for counts in (fuzzer.inputs, fuzzer.outcomes):
        for name, count in counts.items():
            print(f"{count:>11,} {name}")
    print(f"{fuzzer.inputs.total():,} inputs, no finding")


if __name__ == "__main__":
    main()
