"""The contamination check finds what a plain search by sets of token tuples finds, and nothing else."""

import json
import random
import re
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast.contamination import EXACT, GRAM, OVERLAP, Index, Item, read_items
from slmfast.errors import UserError
from slmfast.token_grams import gram_hashes, hash_tokens, text_hashes, tokens

_TOKEN = re.compile(r"[一-鿿㐀-䶿ぁ-ゖァ-ヺ]|[^\W_一-鿿㐀-䶿ぁ-ゖァ-ヺ]+")

TEXTS = [
    "How are You, ＡＢＣ? don't 12.5",
    "你好，world再见",
    "cafe\u0301 ﬁne",
    "",
    "．．… _ !",
    "has_close_elements(numbers: List[float])",
    "カタカナ ｶﾞ",
    "①②⑩ ㎡",
    "Ωmega Ω",
    "x" * 50,
]


def plain_tokens(text):
    """Tokens by a regular expression over the normalised text, for texts of these scripts."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_words_and_han_characters(text):
    assert tokens(text) == plain_tokens(text)


def random_text(random_, words):
    return random_.choice([" ", ", ", "，"]).join(random_.choices(words, k=random_.randint(0, 40)))


def test_hashes_are_equal_where_tokens_are():
    random_ = random.Random(0)
    words = ["a", "Aa", "b", "你", "好你", "ｃ", "1", "e\u0301", "ﬁ"]
    texts = [*TEXTS, *(random_text(random_, words) for _ in range(400))]
    found = hash_tokens(texts)
    lists = [tokens(text) for text in texts]
    assert np.diff(found.starts).tolist() == [len(words) for words in lists]
    flat = [word for words in lists for word in words]
    assert len(set(flat)) == len(set(found.hashes.tolist()))
    assert len(set(zip(flat, found.hashes.tolist(), strict=True))) == len(set(flat))
    assert len(set(map(tuple, lists))) == len(set(text_hashes(found).tolist()))
    for n in (1, 2, 3, 5, 8, 13):
        hashes, places = gram_hashes(found, n)
        grams = [tuple(words[i : i + n]) for words in lists for i in range(len(words) - n + 1)]
        assert [tuple(flat[p : p + n]) for p in places.tolist()] == grams
        assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams)) == len(set(hashes.tolist()))


def test_every_character_gives_as_many_hashes_as_tokens():
    """The passage of a hit is cut out by the numbers of its tokens."""
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    for shape in ("a{}b", "a {} b"):
        texts = [shape.format(character) for character in characters]
        counts = np.diff(hash_tokens(texts).starts).tolist()
        assert [text for text, count in zip(texts, counts, strict=True) if len(tokens(text)) != count] == []


@pytest.mark.parametrize("character", "´¨¯￣゛")
def test_a_mark_that_stands_alone_hides_no_item(character):
    item = " ".join(f"word{n}" for n in range(20))
    hits = Index([Item("gsm8k", "f:1", item, item)]).find([f"x {character} {item}", f"x{character} {item}"])
    assert [(hit.text, hit.how) for hit in hits] == [(0, OVERLAP), (1, OVERLAP)]


def test_hashes_do_not_depend_on_the_other_texts():
    alone = [text_hashes(hash_tokens([text])).tolist()[0] for text in TEXTS]
    assert text_hashes(hash_tokens(TEXTS)).tolist() == alone


def by_sets(items, texts):
    """For each (text, benchmark), the items that share most grams with it, and how many; the definition by hand."""
    grams = [{tuple(w[i : i + GRAM]) for i in range(len(w) - GRAM + 1)} for w in (plain_tokens(i.whole) for i in items)]
    found = {}
    for t, text in enumerate(texts):
        words = plain_tokens(text)
        own = {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
        for item, gram in zip(items, grams, strict=True):
            if own & gram:
                found.setdefault((t, item.benchmark), []).append((len(own & gram) / len(gram), item))
    return found


def test_overlaps_equal_those_of_sets():
    random_ = random.Random(1)
    words = [f"w{i}" for i in range(60)] + list("天地玄黄宇宙洪荒日月盈昃辰宿列张")
    whole = [" ".join(random_.choices(words, k=random_.randint(3, 60))) for _ in range(60)]
    items = [Item("ab"[i % 2], f"f:{i}", text, text) for i, text in enumerate(whole)]
    texts = []
    for _ in range(300):
        source = random_.choice(whole).split(" ")
        start = random_.randrange(len(source))
        part = source[start : start + random_.randint(1, 40)]
        texts.append(", ".join([*random_.choices(words, k=5), *part, *random_.choices(words, k=5)]).upper())
    wanted = by_sets(items, texts)
    hits = list(Index(items).find(texts))
    assert 50 < len(hits) < 280
    assert [(hit.text, hit.item.benchmark) for hit in hits] == sorted(wanted)
    for hit in hits:
        share, _ = max(wanted[hit.text, hit.item.benchmark], key=lambda pair: pair[0])
        assert (hit.how, hit.share) == (OVERLAP, pytest.approx(share))
        assert hit.passage.split() in [plain_tokens(texts[hit.text])[i : i + GRAM] for i in range(80)]
        assert f" {hit.passage} " in f" {' '.join(plain_tokens(hit.item.whole))} "


def test_a_short_item_counts_only_as_a_whole():
    index = Index([Item("mmlu", "f:1", "What is a cat?", "What is a cat?\nA. one\nB. two")])
    texts = ["what is a CAT", "What is a cat? A one, B two", "Tell me: what is a cat?", "", "?!"]
    assert [(hit.text, hit.how, hit.share) for hit in index.find(texts)] == [(0, EXACT, 1.0), (1, EXACT, 1.0)]


def test_a_whole_item_of_several_benchmarks_is_one_of_each():
    items = [
        Item(name, f"{name}:{n}", "What is a cat?", "What is a cat?") for n in (1, 2) for name in ("mmlu", "ceval")
    ]
    hits = list(Index(items).find(["Nothing.", "what is a CAT"]))
    assert [(hit.text, hit.item.place, hit.how) for hit in hits] == [(1, "ceval:1", EXACT), (1, "mmlu:1", EXACT)]


def test_what_many_items_of_a_benchmark_share_is_nobodys():
    stem = " ".join(f"stem{i}" for i in range(GRAM))
    shared = [Item("many", f"f:{i}", *[f"{stem} end{i}"] * 2) for i in range(11)]
    few = [Item("few", f"g:{i}", *[f"{stem} other{i}"] * 2) for i in range(10)]
    assert [hit.item.benchmark for hit in Index([*shared, *few]).find([stem])] == ["few"]


def test_the_same_hits_in_any_chunks(monkeypatch):
    items = [Item("b", f"f:{i}", *[" ".join(f"w{i + j}" for j in range(20))] * 2) for i in range(0, 60, 7)]
    texts = [" ".join(f"w{i + j}" for j in range(30)) for i in range(50)]
    wanted = list(Index(items).find(texts))
    assert wanted
    monkeypatch.setattr("slmfast.contamination.chunks", lambda texts: ([text] for text in texts))
    assert list(Index(items).find(texts)) == wanted


def test_items_of_every_layout(tmp_path):
    (tmp_path / "mmlu.csv").write_text('"Why, so?",one,two,three,four,B\nHow?,1,2,3,4,A\n', encoding="utf-8")
    (tmp_path / "cmmlu.csv").write_text("\ufeff,Question,A,B,C,D,Answer\n0,为什么,甲,乙,丙,丁,A\n", encoding="utf-8")
    (tmp_path / "gsm.jsonl").write_text(json.dumps({"question": "3+4?", "answer": "#### 7"}) + "\n")
    (tmp_path / "he.jsonl").write_text(json.dumps({"prompt": "def f():", "test": "x"}) + "\n")
    pq.write_table(pa.table({"question": ["Q"], "choices": [["a", "b"]]}), tmp_path / "m.parquet")
    names = ("mmlu.csv", "cmmlu.csv", "gsm.jsonl", "he.jsonl", "m.parquet")
    read = read_items({name: [tmp_path / name] for name in names})
    assert [(item.place, item.question, item.whole) for item in read] == [
        ("mmlu.csv:1", "Why, so?", "Why, so?\nA. one\nB. two\nC. three\nD. four"),
        ("mmlu.csv:2", "How?", "How?\nA. 1\nB. 2\nC. 3\nD. 4"),
        ("cmmlu.csv:2", "为什么", "为什么\nA. 甲\nB. 乙\nC. 丙\nD. 丁"),
        ("gsm.jsonl:1", "3+4?", "3+4?"),
        ("he.jsonl:1", "def f():", "def f():"),
        ("m.parquet:1", "Q", "Q\nA. a\nB. b"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("a.jsonl", '{"q": 1}\n', "item 1 of .*a.jsonl lacks the columns question"), ("b.csv", "", "b.csv holds no item")],
)
def test_a_file_without_questions_is_refused(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected):
        read_items({"mmlu": [tmp_path / name]})


def test_real_benchmarks_find_themselves(real_data):
    paths = {"gsm8k": [real_data / "gsm8k/test.jsonl"], "cmmlu": sorted((real_data / "cmmlu/test").glob("a*.csv"))}
    items = read_items(paths)
    hits = list(Index(items).find(item.whole for item in items))
    assert {hit.text for hit in hits if hit.how == EXACT} == set(range(len(items)))
    train = [json.loads(line)["question"] for line in (real_data / "gsm8k/train.jsonl").open(encoding="utf-8")]
    wanted = by_sets(items, train)
    assert {(hit.text, hit.item.benchmark) for hit in Index(items).find(train)} == set(wanted)
