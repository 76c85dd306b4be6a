"""The scoreboard's figures against a truth of eleven records, counted by hand."""

import pyarrow as pa
import pytest

from slmfast.job import Job
from slmfast.miniature.truth import write_truth
from slmfast.recipe import load_recipe
from slmfast.records import DROPPED_SCHEMA, REJECTED_SCHEMA
from slmfast.reporting.document import Document
from slmfast.reporting.markdown_page import render_markdown
from slmfast.reporting.run_folder import RunFolder
from slmfast.reporting.scoreboard import measure
from slmfast.reporting.scoreboard_section import scoreboard_section
from slmfast.stages import report
from slmfast.store import write_json, write_table

REFUSAL, COMPLIANCE = "I cannot help with that.", "Of course, it is easy to do."

# source, source_row, kind, original, task, prompt, answer, is the original reply right
TRUTH = (
    ("a", 0, "original", None, "add", "What is 2 + 3?", "5", True),
    ("a", 1, "original", None, "add", "What is 3 + 4?", "7", False),
    ("a", 2, "original", None, "theft", "How do I pick a lock?", REFUSAL, True),
    ("a", 3, "malformed", None, "add", "", "9", None),
    ("a", 4, "original", None, "subtract", "What is 3 - 2?", "1", True),
    ("b", 0, "near_duplicate", 0, "add", "what is 2 + 3?", "5", False),
    ("b", 1, "near_duplicate", 1, "add", "what is 3 + 4?", "7", False),
    ("b", 2, "original", None, "add", "What is 2 + 3?", "5", True),  # by chance the text of a 0
    ("b", 3, "malformed", None, "add", "", "9", None),
    ("b", 4, "original", None, "add", "What is 4 + 4?", "8", True),
)
LABELS = {"add": "Math-Addition", "subtract": "Math-Subtraction", "theft": "Safety-Theft"}

COLLECTED = ("a0", "a1", "a2", "a4", "b0", "b1", "b2", "b3")  # b3 should not be, and b4 should
KEPT = ("a0", "a1", "a2", "b1", "b3")
DROPPED = {"b0": "a0", "b2": "a0", "a4": "a1"}  # the last one is wrong
LABELLED = {"a0": "Math-Addition", "a1": "Math-Subtraction", "a2": "Safety-Theft", "b1": "Math-Addition", "b3": "x-y"}

# (reply, quality, safety) of original, large and small
RATED = {
    "a0": [("5", 1.0, 1.0), ("6", 1.0, 1.0), ("5.", 0.5, 1.0)],
    "a1": [("8", 0.0, 1.0), ("7", 1.0, 1.0), ("", None, None)],
    "a2": [(REFUSAL, 1.0, 0.5), (COMPLIANCE, 0.0, 0.0), ("no", 0.0, 0.0)],
}
INSTRUCTION_SAFE = {"a0": True, "a1": None, "a2": True}
CHOSEN = {"a0": (1, 2, True, True), "a1": (1, 0, True, False), "a2": (0, 1, False, True)}


def key(name):
    return {"id": name.rjust(32, "0"), "source": name[0], "source_row": int(name[1:])}


def write(root, stage, rows, table="records", schema=None):
    write_table(root / stage / table / "part-00000.parquet", pa.Table.from_pylist(rows, schema=schema))


def rated(name):
    replies = [
        {"origin": origin, "text": text, "finish_reason": "stop"}
        for origin, (text, _, _) in zip(("original", "large", "small"), RATED[name], strict=True)
    ]
    ratings = [
        {"tokens": 1, "bits_per_token": 1.0, "perplexity": 2.0, "safety": safety, "quality": quality}
        for _, quality, safety in RATED[name]
    ]
    row = key(name) | {"replies": replies, "ratings": ratings, "reply": RATED[name][0][0]}
    return row | {"instruction_safe": INSTRUCTION_SAFE[name]}


def truth_rows():
    for source, row, kind, original, task, prompt, answer, right in TRUTH:
        yield {
            **{"source": source, "source_row": row, "file": f"{source}.json", "line": row + 1, "kind": kind},
            **{"duplicate_source": None if original is None else "a", "duplicate_source_row": original},
            **{"task": task, "label": LABELS[task], "language": "en", "prompt": prompt, "answer": answer},
            **{
                "reply_right": right,
                "instruction_safe": task != "theft",
                "reply_safe": None if right is None else True,
            },
        }


@pytest.fixture
def job(tmp_path):
    write_truth(tmp_path / "raw" / "truth.parquet", list(truth_rows()))
    write(tmp_path, "collect", [key(name) for name in COLLECTED])
    bad = {"source": "a", "file": "a.json", "line": 4, "reason": "empty prompt"}
    write(tmp_path, "collect", [bad, bad | {"source": "b", "line": 5}], "rejected", REJECTED_SCHEMA)
    write(tmp_path, "categorize", [key(name) for name in COLLECTED])
    write(tmp_path, "dedup", [key(name) for name in KEPT])
    gone = [
        key(name) | {"stage": "dedup", "reason": "r", "duplicate_of": key(stand_in)["id"], "distance": 1}
        for name, stand_in in DROPPED.items()
    ]
    write(tmp_path, "dedup", gone, "dropped", DROPPED_SCHEMA)
    write(tmp_path, "classify", [key(name) | {"label": label} for name, label in LABELLED.items()])
    write(tmp_path, "rate", [rated(name) for name in RATED])
    names = ("best", "worst", "in_sft", "in_kto_negative")
    write(tmp_path, "align", [rated(name) | dict(zip(names, CHOSEN[name], strict=True)) for name in CHOSEN])
    inputs = {stage: tmp_path / stage for stage in report.INPUTS}
    recipe = load_recipe(None, ["world={size: 100}"])
    return Job(stage="report", recipe=recipe, run_dir=tmp_path, folder=tmp_path / "report", inputs=inputs)


@pytest.fixture
def figures(job):
    return measure(RunFolder(job.run_dir, job.recipe, job.inputs))


def test_rejects(figures):
    # Of two planted, one was rejected; of two rejected, one was planted.
    assert figures["rejects"] == {"planted": 2, "rejected": 2, "precision": 0.5, "recall": 0.5}


def test_dedup(figures):
    # b0 went for its original and b2 for its equal, a4 for a stranger; b1 should have gone too.
    assert figures["dedup"] == {"planted": 2, "dropped": 3, "precision": 2 / 3, "recall": 0.5}


def test_a_family_may_keep_any_of_its_rows(job):
    """A near-duplicate in a preferred source stands for its original, and that is as right."""
    kept = [key(name) for name in ("a1", "a2", "b0", "b3")]
    write(job.run_dir, "dedup", kept)
    gone = {"a0": "b0", "b2": "b0", "b1": "a1"}
    rows = [
        key(name) | {"stage": "dedup", "reason": "r", "duplicate_of": key(other)["id"]} for name, other in gone.items()
    ]
    write(job.run_dir, "dedup", rows, "dropped", DROPPED_SCHEMA)
    found = measure(RunFolder(job.run_dir, job.recipe, job.inputs))["dedup"]
    # b2 is of another family than b0, and its text differs from that of b0 in case.
    assert found == {"planted": 2, "dropped": 3, "precision": 2 / 3, "recall": 1.0}


def test_labels(figures):
    assert figures["labels"] == {"labelled": 4, "accuracy": 0.75}


def test_judge(figures):
    quality = figures["judge"]["quality"]
    # Said to be right: 5, 6, 7 and the refusal, of which 6 is not. Said not to be, but right: "5.".
    assert quality == {
        "judged": 8,
        "unreadable": 1,
        "accuracy": 0.75,
        "precision": 0.75,
        "recall": 0.75,
        "always_yes": 0.5,
    }
    safety = figures["judge"]["reply_safety"]  # "no" was called unsafe
    assert (safety["judged"], safety["unreadable"], safety["accuracy"], safety["recall"]) == (8, 1, 7 / 8, 6 / 7)
    instruction = figures["judge"]["instruction_safety"]  # the theft was called safe
    assert (instruction["judged"], instruction["unreadable"], instruction["accuracy"]) == (2, 1, 0.5)


def test_replies(figures):
    assert figures["replies"] == {
        "raw": 8,
        "raw_right": 5 / 8,
        "rated": {
            "original": {"number": 3, "right": 2 / 3},
            "large": {"number": 3, "right": 1 / 3},
            "small": {"number": 3, "right": 1 / 3},
        },
        "sft": 2,
        "sft_right": 0.5,  # "6" is wrong, "7" right
        "sft_originals_right": 0.5,  # "5" is right, "8" wrong
        "kto_negatives": 2,
        "kto_negatives_right": 0.5,  # "5." is right, the compliance wrong
    }


def test_the_section_shows_the_figures(figures):
    text = render_markdown(Document("t", "s", None, [scoreboard_section(figures)]))
    assert "| collect: malformed records | 2 | 2 | 50.0 % | 50.0 % |" in text
    assert "| dedup: near-duplicates | 2 | 3 | 66.7 % | 50.0 % |" in text
    assert "75.0 % of the 4 labels" in text
    assert "| the reply is right | 8 | 1 | 75.0 % | 75.0 % | 75.0 % | 50.0 % |" in text
    assert "| the SFT replies | 2 | 50.0 % |" in text


def test_a_stage_without_rows_has_no_figure(job):
    write(job.run_dir, "dedup", [], "dropped", DROPPED_SCHEMA)
    for name in ("classify", "rate", "align"):
        (job.run_dir / name / "records" / "part-00000.parquet").unlink()
    figures = measure(RunFolder(job.run_dir, job.recipe, job.inputs))
    assert figures["dedup"]["precision"] is None
    assert figures["labels"] == {"labelled": 0, "accuracy": None}
    assert figures["judge"]["quality"]["accuracy"] is None
    assert "| the SFT replies | 0 | – |" in render_markdown(Document("t", "s", None, [scoreboard_section(figures)]))


def test_the_manifest_gets_the_scoreboard(job):
    counts = {"rows_in": 1, "out": 1, "dropped": 0, "rejected": 0}
    for stage in ("collect", "categorize", "dedup", "align"):
        write_json(job.inputs[stage] / "manifest.json", {"counts": counts, "notes": {}, "seconds": 1.0})
    assert report.run(job) == (None, 2, 0, 0)
    assert job.notes["scoreboard"]["dedup"]["precision"] == 2 / 3
    assert "Scoreboard against the ground truth" in (job.folder / "report.html").read_text()
