"""The data card states what the run states, proves the sets by their hashes, and is the same whenever it is written."""

import hashlib
import re

import pyarrow as pa
import pytest

from slmfast import pipeline
from slmfast.job import Job
from slmfast.recipe import STAGES, load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.stages import align, categorize, classify, rate, regenerate
from slmfast.store import DATA_CARD, ShardWriter, read_manifest, write_json

SCHEMA = pa.schema([*RECORD_SCHEMA, *categorize.COLUMNS, *classify.COLUMNS, *regenerate.COLUMNS, *rate.COLUMNS])


def rated(n):
    texts = ("fair", f"right {n}", f"wrong {n}")
    replies = [
        {"origin": o, "text": t, "finish_reason": "stop"}
        for o, t in zip(("original", "large", "small"), texts, strict=True)
    ]
    row = {"id": f"{n:032x}", "source": "belle" if n % 3 else "dolly", "source_row": n, "reply": "fair"}
    row |= {
        "language": "zh" if n % 3 else "en",
        "prompt": [{"role": "user", "content": f"问题 {n}"}],
        "replies": replies,
    }
    row |= {"category": "math", "rule_id": "m", "label": "Math-Sum", "label_reply": "x", "instruction_safe": True}
    rating = {"tokens": 3, "bits_per_token": 1.0, "perplexity": 2.0, "safety": 1.0}
    return row | {"ratings": [rating | {"quality": quality} for quality in (0.5, 1.0, 0.0)]}


def recipe(licence="GPL-3.0", more=()):
    sources = f"[{{name: dolly, format: dolly, path: d, licence: {licence}}}, {{name: belle, format: belle, path: b}}]"
    return load_recipe(None, ["name=tiny", f"collect.sources={sources}", "align.sft_size=20", *more])


@pytest.fixture
def run(tmp_path):
    for stage in STAGES[: STAGES.index("rate") + 1]:
        rows = 36 if stage == "collect" else 30
        with ShardWriter(tmp_path / stage / "records", SCHEMA) as writer:
            writer.write([rated(n) for n in range(rows)])
        counts = {"rows_in": 40 if stage == "collect" else rows, "out": rows, "dropped": 0, "rejected": 0}
        notes = {"sources": {"dolly": {"records": 12, "rejected": 4}}, "files": {"dolly": {"d|x.jsonl": "f" * 32}}}
        manifest = {"stage": stage, "key": "k", "outputs": {}, "digest": stage, "counts": counts, "seconds": 77.5}
        write_json(tmp_path / stage / "manifest.json", manifest | {"notes": notes if stage == "collect" else {}})
    return tmp_path


def write(run, **options):
    job = Job("align", recipe(**options), run, run / "align", {"rate": run / "rate"})
    if not (run / "align" / "manifest.json").exists():
        pipeline.run_stage(job)
    pipeline.accompany(job)
    return (run / "align" / DATA_CARD).read_text(encoding="utf-8")


def cells(card, first):
    """The other cells of all rows that begin with a cell."""
    found = re.findall(rf"^\| {re.escape(first)} \| (.*) \|$", card, flags=re.MULTILINE)
    return [row.split(" | ") for row in found]


def test_counts_sources_and_licences(run):
    card = write(run)
    assert cells(card, "SFT")[0][-1] == "20" and cells(card, "KTO")[0][-1] == "30"
    assert cells(card, "dolly")[0][:4] == ["GPL-3.0", "dolly", "12", "4"]
    assert cells(card, "belle")[0][:4] == ["no licence given", "belle", "–", "–"]
    assert "No licence given: belle." in card and "How to reproduce" in card
    assert cells(card, "collect") == [["40", "36", "0", "0"]]
    by_source, by_language = cells(card, "belle")[1], cells(card, "Chinese")[0]
    assert by_source[:7] == by_language[:7] == ["24", *["20"] * 6]
    sft = [int(cells(card, name)[1][-2]) for name in ("dolly", "belle")]
    assert sum(sft) == 20
    assert cells(card, "items of mmlu") == [["not checked"]]
    assert cells(card, "dolly")[2] == ["d\\|x.jsonl", "f" * 32]


def test_hashes_are_those_of_the_files(run):
    rows = re.findall(r"^\| (\S+\.(?:parquet|jsonl|json)) \| ([0-9a-f]{32}) \|$", write(run), flags=re.MULTILINE)
    assert {name.split("/")[0] for name, _ in rows} == {"sft", "kto", "llamafactory"}
    for name, value in rows:
        data = (run / "align" / name).read_bytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == value


def test_it_is_the_same_whenever_it_is_written(run):
    card = write(run)
    (run / "align" / DATA_CARD).unlink()
    manifest = read_manifest(run / "collect")
    write_json(run / "collect" / "manifest.json", manifest | {"seconds": 99.5})
    assert write(run) == card
    assert "77.5" not in card and not re.search(r"\d\d:\d\d|20\d\d-\d\d", card)


def test_it_is_no_output_and_follows_the_recipe(run):
    write(run)
    before = read_manifest(run / "align")
    assert DATA_CARD not in before["outputs"]
    assert cells(write(run, licence="MIT"), "dolly")[0][0] == "MIT"
    job = Job("align", recipe("MIT"), run, run / "align", {"rate": run / "rate"})
    assert pipeline.is_up_to_date(job) and read_manifest(run / "align") == before


def alone(folder, rated):
    """The card of an align that ran by itself on what `rated` holds."""
    job = Job("align", recipe(), folder / "out", folder / "out", {"rate": rated})
    pipeline.run_stage(job)
    align.accompany(job)
    return (folder / "out" / DATA_CARD).read_text(encoding="utf-8")


def test_of_stages_run_apart_it_claims_nothing(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    card = alone(folder, (run / "rate").rename(folder / "rated"))
    assert cells(card, "SFT")[0][-1] == "20" and cells(card, "rate") == [["30", "30", "0", "0"]]
    assert not cells(card, "collect") and "GPL-3.0" not in card and "How to reproduce" not in card
    assert "Not known here: collect, categorize, dedup, classify, diversify, regenerate, run apart" in card
    assert "target:" not in card and "sft_size: 20" in card and "licences are not known here" in card


def test_it_follows_the_manifests_of_stages_run_apart(run, tmp_path_factory):
    """In folders of any name; a neighbour of the same stage and another digest is not taken."""
    folder = tmp_path_factory.mktemp("apart")
    names = STAGES[: STAGES.index("rate") + 1]
    for before, stage in zip((None, *names), names, strict=False):
        (run / stage).rename(folder / f"a {stage}")
        manifest = read_manifest(folder / f"a {stage}") | {"inputs": {before: before} if before else {}, "seed": 7}
        manifest["settings"] = {"target": 123} if stage == "diversify" else {}
        if stage == "collect":
            manifest["settings"] = {"sources": [{"name": "dolly", "format": "dolly", "licence": None}]}
        if stage == "dedup":
            manifest["settings"] = {"k": 2, "verify": None}
        write_json(folder / f"a {stage}" / "manifest.json", manifest)
    other = read_manifest(folder / "a diversify") | {"digest": "other", "settings": {"target": 999}}
    write_json(folder / "a a" / "manifest.json", other)
    write_json(folder / "b b" / "manifest.json", ["of another program"])
    card = alone(folder, folder / "a rate")
    assert "target: 123" in card and "999" not in card and "seed: 7" in card
    assert cells(card, "dolly")[0][:4] == ["no licence given", "dolly", "12", "4"]
    assert cells(card, "collect") == [["40", "36", "0", "0"]] and "at a distance of 2:" in card
    assert "Not known here" not in card and "How to reproduce" not in card


def test_a_served_model_is_called_by_the_servers_name(run):
    served = "{large: {kind: openai, base_url: http://127.0.0.1:1/v1, model: Served-7B, tokenizer: builtin:large}}"
    card = write(run, more=[f"engines={served}"])
    assert "Served-7B" in card and "Served-7B (the large model)" in card and "builtin:large |" not in card
    assert "base_url: http://127.0.0.1:1/v1" in card
