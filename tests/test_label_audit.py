"""The label audit: who is asked, which labels fall, what people get, and that every dropped row says why."""

import csv
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast import job, label_audit, pipeline
from slmfast.errors import UserError
from slmfast.job import Job
from slmfast.labels import parse_label
from slmfast.miniature.world import write_world
from slmfast.recipe import load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.stages import categorize, classify, diversify
from slmfast.store import ShardWriter, read_manifest

SCHEMA = pa.schema([*RECORD_SCHEMA, *categorize.COLUMNS, *classify.COLUMNS])
SIZES = {"Good-One": 30, "Bad-One": 25, "Odd-Unread": 20, "=Half-One": 16, "Rare-One": 3}


def row(n, label, prompt, source="test"):
    record = {"id": f"{n:032x}", "source": source, "source_row": n, "language": "en", "source_category": None}
    record |= {"prompt": [{"role": "user", "content": prompt}], "reply": "x", "category": "math", "rule_id": "m"}
    return record | {"label": label, "label_reply": label}


def write(folder, rows):
    with ShardWriter(folder / "classify" / "records", SCHEMA) as writer:
        writer.write(rows)


class Judge:
    """Says yes to Good, no to Bad, in turns to Half; can't read Odd. Notes what it is asked."""

    def __init__(self):
        self.asked, self.token_budget, self.calls_left = [], None, 99

    ahead = 0

    def fix_token_budget(self):
        self.token_budget = 7
        return 7

    def state(self):
        return ""

    def notes(self):
        return {}

    def close(self):
        pass

    def choose(self, prompts, choices):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        assert all(list(choice) == ["yes", "no"] for choice in choices) and self.token_budget in (7, 3)
        self.asked += [prompt[0]["content"] for prompt in prompts]
        return [self._answer(prompt[0]["content"]) for prompt in prompts]

    def _answer(self, text):
        if "Label: Odd" in text:
            return np.array([np.nan, np.nan])
        yes = "Label: Good" in text or ("Label: =Half" in text and int(text.split()[1]) % 2 == 0)
        return np.log([0.75, 0.25]) if yes else np.log([0.25, 0.75])


@pytest.fixture
def folder(tmp_path):
    labels = [label for label, size in SIZES.items() for _ in range(size)]
    write(tmp_path, [row(n, label, f"question {n} of many") for n, label in enumerate(labels)])
    return tmp_path


@pytest.fixture
def judge(monkeypatch):
    judge = Judge()
    monkeypatch.setattr(job, "open_engine", lambda engine, model, **settings: judge)
    return judge


def make(folder, *overrides, name="diversify"):
    recipe = load_recipe(None, ["diversify.audit=8", *[f"diversify.{override}" for override in overrides]])
    return Job("diversify", recipe, folder, folder / name, {"classify": folder / "classify"})


def run(job):
    pipeline.run_stage(job)
    return read_manifest(job.folder)


def labels_of(path):
    return Counter(pq.read_table(path).column("label").to_pylist())


def read_csv(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_sample_takes_the_smallest_hashes_of_each_label():
    random = np.random.default_rng(0)
    labels, hashes = random.integers(-2, 6, 500), random.integers(0, 1 << 60, 500).astype(np.uint64)
    chosen = label_audit.sample(labels, hashes, 9)
    for label in range(6):
        own = np.flatnonzero(labels == label)
        assert set(np.flatnonzero(chosen & (labels == label))) == set(own[np.argsort(hashes[own])[:9]])
    assert not chosen[labels < 0].any()
    assert not label_audit.sample(np.array([-1, -1]), hashes[:2], 3).any()


def test_denied_labels_fall_and_every_row_says_why(folder, judge):
    counts = run(make(folder))["counts"]
    assert counts["rows_in"] == counts["out"] + counts["dropped"] == sum(SIZES.values())
    kept = labels_of(folder / "diversify" / "records")
    assert "Bad-One" not in kept and kept["Good-One"] == 30 and kept["Odd-Unread"] == 20
    dropped = Counter(pq.read_table(folder / "diversify" / "dropped").column("reason").to_pylist())
    wrong = dropped["a label that the judge often finds wrong (diversify.audit_threshold)"]
    assert dropped["a label of too few records (diversify.min_label_count)"] == 3
    assert wrong == 25 + (0 if "=Half-One" in kept else 16)
    assert len(judge.asked) == 4 * 8 and not any("Rare" in text for text in judge.asked)


def test_the_threshold_decides(folder, judge):
    judged = run(make(folder, "audit_threshold=0"))["notes"]["audit"]
    assert judged["failed"] == {} and judged["sampled"] == 32 and judged["unreadable"] == 8
    failed = run(make(folder, "audit_threshold=1", name="strict"))["notes"]["audit"]["failed"]
    assert set(failed) == {"Bad-One", "=Half-One"} and failed["Bad-One"] == [25, 0, 8]


def test_people_get_the_sample(folder, judge):
    run(make(folder))
    rows = read_csv(folder / "diversify" / "audit.csv")
    assert Counter(row["label"] for row in rows) == {"Good-One": 8, "Bad-One": 8, "Odd-Unread": 8, "'=Half-One": 8}
    assert {(r["label"], r["judge"], r["yes_probability"]) for r in rows if "Half" not in r["label"]} == {
        ("Good-One", "yes", "0.750"),
        ("Bad-One", "no", "0.250"),
        ("Odd-Unread", "unreadable", ""),
    }
    assert all(row["human"] == "" and row["instruction"] == f"question {row['source_row']} of many" for row in rows)
    labels = {row["label"]: row for row in read_csv(folder / "diversify" / "audit_labels.csv")}
    assert next(iter(labels)) == "Bad-One"
    assert (labels["Bad-One"]["accuracy"], labels["Bad-One"]["kept"]) == ("0.000", "no")
    assert (labels["Odd-Unread"]["accuracy"], labels["Odd-Unread"]["kept"]) == ("", "yes")


def test_off_by_default_and_then_no_model_counts(folder, judge):
    job = make(folder, "audit=null")
    assert "audit" not in run(job)["notes"] and judge.asked == []
    assert pipeline.model_roles(job) == () and pipeline.model_roles(make(folder)) == ("judge",)
    assert not (folder / "diversify" / "audit.csv").exists()


def test_a_broken_audit_goes_on_where_it_was(folder, judge, monkeypatch):
    wanted = run(make(folder, name="whole"))["outputs"]
    judge.asked.clear()
    monkeypatch.setattr(diversify, "AUDIT_ROWS", 5)
    judge.calls_left = 3
    with pytest.raises(KeyboardInterrupt):
        run(make(folder))
    judge.calls_left = 99
    assert run(make(folder))["outputs"] == wanted
    assert len(judge.asked) == len(set(judge.asked)) == 32


def test_where_memory_ran_short_the_unit_is_judged_again_with_the_smaller_budget(folder, judge, monkeypatch):
    """And a restart goes on with that one, so that a broken run gives the same scores."""
    answer = judge.choose

    def short(prompts, choices):
        found = answer(prompts, choices)
        judge.token_budget = 3
        return found

    monkeypatch.setattr(judge, "choose", short)
    audit = run(make(folder))["notes"]["audit"]
    assert (audit["token_budget"], audit["out_of_memory"]) == (3, 1)
    assert len(judge.asked) == 2 * 32 and len(set(judge.asked)) == 32


def test_nothing_left_is_a_user_error(folder, judge):
    judge._answer = lambda text: np.log([0.1, 0.9])
    with pytest.raises(UserError, match=r"diversify\.audit_threshold"):
        run(make(folder))


@pytest.mark.slow
def test_the_miniatures_judge_finds_a_wrong_label(tmp_path):
    """A label that stands on records of other skills falls; the true ones stay."""
    write_world(tmp_path / "raw", size=600, seed=3)
    truth = pq.read_table(tmp_path / "raw" / "truth.parquet").to_pylist()
    rows = [fact for fact in truth if fact["kind"] == "original"][:260]
    labels = [parse_label(fact["label"]) for fact in rows]
    common = [label for label, count in Counter(labels).most_common(6)]
    wrong = {common[0]: "Knowledge-Calendar", "Knowledge-Calendar": None}
    records = [
        row(n, wrong.get(label, label), fact["prompt"], fact["source"])
        for n, (fact, label) in enumerate(zip(rows, labels, strict=True))
        if label in common and wrong.get(label, label)
    ]
    write(tmp_path, records)
    run(make(tmp_path, "min_label_count=5", "audit=6"))
    kept = labels_of(tmp_path / "diversify" / "records")
    assert set(kept) == set(common[1:]) - {"Knowledge-Calendar"}
