"""The report shows a run's own figures, loads nothing from anywhere, and takes hostile data for what it is: text."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
from collections import Counter

import pyarrow as pa
import pytest

from slmfast.contamination import CONTAMINATION_SCHEMA
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.records import DROPPED_SCHEMA, RECORD_SCHEMA, REJECTED_SCHEMA
from slmfast.reporting.build import build_document
from slmfast.reporting.document import decimal, with_error
from slmfast.reporting.html_page import render_html
from slmfast.reporting.label_section import agreement
from slmfast.reporting.markdown_page import render_markdown
from slmfast.reporting.run_folder import RunFolder
from slmfast.stages import align, categorize, classify, rate, regenerate, report
from slmfast.store import ShardWriter, write_json, write_table

HOSTILE = (
    '<script src="http://evil.example/x.js"></script> <img src=x onerror=alert(1)> $x_{1}$ | '
    "`a` [b](http://evil.example) \x07\r\n结束"
)
NOTE = "These figures mean nothing as quality <b>."
COUNTS = {
    "collect": (1237, 1201, 0, 36),
    "categorize": (1201, 1201, 0, 0),
    "dedup": (1201, 1109, 92, 0),
    "classify": (1109, 1088, 21, 0),
    "diversify": (1088, 413, 675, 0),
    "regenerate": (413, 413, 0, 0),
    "rate": (413, 413, 0, 0),
    "align": (413, 307, 106, 0),
    "train": (None, 3, 0, 0),
    "fuse": (None, 1, 0, 0),
    "evaluate": (None, 5, 0, 0),
}
NOTES = {
    "classify": {"label_ends": {"stop": 1000, "length": 77, "content_filter": 11}},
    "diversify": {
        "labels": {"Math-Addition": [901, 209], HOSTILE: [187, 204], "其他-闲聊": [3, 0]},
        "entropy_bits": [0.731, 1.002],
        "gini": [0.512, 0.011],
        "audit": {
            "threshold": 0.5,
            "sampled": 24,
            "agreed": 15,
            "denied": 5,
            "unreadable": 4,
            "labels": 3,
            "failed": {HOSTILE: [187, 2, 6]},
        },
    },
    "align": {
        "sets": {"sft": 246, "kto": 369, "kto_positive": 246, "kto_negative": 123},
        "with_best": 301,
        "with_worst": 199,
        "max_bits_per_token": 7.25,
        "contamination": {
            "mode": "report",
            "benchmarks": {"gsm8k": {"items": 1319, "records": 2, "exact": 1, "in_sets": 1}},
        },
    },
}
MODELS = ("base", "S1", "S2", "S3", "fused")


def record(n: int) -> dict:
    prompt = [{"role": "user", "content": HOSTILE if n == 0 else f"问题 {n}?"}]
    row = {"id": f"{n:032x}", "source": "dolly" if n % 3 else "belle", "source_row": n, "source_category": None}
    row |= {"language": "en" if n % 2 else "zh", "prompt": prompt, "reply": f"reply {n}"}
    row |= {"category": HOSTILE if n == 1 else "math", "rule_id": "m1", "label": "Math-Addition", "label_reply": "x"}
    row["label_generation"] = {"model": "m", "parameters": "{}", "seed": 0, "tokens": 2, "finish_reason": "stop"}
    texts = (("original", f"reply {n}"), ("large", HOSTILE), ("small", "???"))
    small = "length" if n else "refused"
    row["replies"] = [{"origin": o, "text": t, "finish_reason": small if o == "small" else "stop"} for o, t in texts]
    grades = ((1.0, 0.5, 0.5), (1.0, 1.0, 2.0), (0.0, None, None))
    row["ratings"] = [
        {"tokens": 3, "bits_per_token": b, "perplexity": None if b is None else 2.0**b, "safety": s, "quality": q}
        for s, q, b in grades
    ]
    return row | {"instruction_safe": True, "best": 1, "worst": 0, "in_sft": n < 4, "in_kto_negative": n < 2}


def write_rows(folder, schema, rows):
    with ShardWriter(folder, schema) as writer:
        writer.write([{name: row[name] for name in schema.names} for row in rows])


def make_job(root, *, note=NOTE, items=True, stages=tuple(COUNTS), override=()) -> Job:
    """A small finished run under `root`, and the report's job on it."""
    recipe = load_recipe(None, ["name=tiny", "evaluate.tasks=[arith, text]", *override])
    if note:
        recipe = load_recipe(None, ["name=tiny", "evaluate.tasks=[arith, text]", f"report.note={note}", *override])
    for stage in stages:
        manifest = {"counts": dict(zip(("rows_in", "out", "dropped", "rejected"), COUNTS[stage], strict=True))}
        manifest |= {"notes": NOTES.get(stage, {}), "seconds": 12.3, "code_version": "9.9.9"}
        write_json(root / stage / "manifest.json", manifest)
    rows = [record(n) for n in range(6)]
    schema = RECORD_SCHEMA
    added = {"collect": [], "categorize": categorize.COLUMNS, "dedup": [], "classify": classify.COLUMNS}
    added |= {"regenerate": regenerate.COLUMNS, "rate": rate.COLUMNS, "align": align.COLUMNS}
    for stage, columns in added.items():
        schema = pa.schema([*schema, *columns])
        if stage in stages:
            write_rows(root / stage / "records", schema, rows)
    gone = {"id": "f" * 32, "source": "belle", "source_row": 9, "stage": "dedup", "reason": "near-duplicate"}
    write_rows(root / "dedup" / "dropped", DROPPED_SCHEMA, [gone | {"duplicate_of": "0" * 32, "distance": 2}] * 92)
    bad = {"source": "belle", "file": "belle.json", "line": 3, "reason": f"no reply: {HOSTILE}"}
    write_rows(
        root / "collect" / "rejected",
        REJECTED_SCHEMA,
        [bad] * 34 + [bad | {"reason": f"broken at column {c}"} for c in (1, 27)],
    )
    if "align" in stages:
        hit = {"part": "prompt", "benchmark": "gsm8k", "item": "test.jsonl:7", "how": "x", "in_sets": True}
        hits = [hit | {"id": f"{n:032x}", "share": n / 2, "passage": HOSTILE} for n in (1, 2)]
        write_rows(root / "align" / "contamination", CONTAMINATION_SCHEMA, hits)
    write_models(root, items)
    inputs = {stage: root / stage for stage in report.INPUTS}
    return Job(stage="report", recipe=recipe, run_dir=root, folder=root / "report", inputs=inputs)


def write_models(root, items):
    for name in ("S1", "S2", "S3"):
        log = [{"step": i, "loss": 2.0 / i, "learning_rate": 1e-4, "odd": "x"} for i in range(1, 81)]
        if name != "S1":
            log = [row | {"reward_desirable": 0.1, "reward_undesirable": -0.2, "margin": 0.3, "z0": 0.0} for row in log]
        write_json(root / "train" / name / "training_log.json", log)
    parts = [{"name": name, "weight": 1 / 3, "digest": "d" * 32} for name in ("S1", "S2", "S3")]
    write_json(root / "fuse" / "fused" / "fusion.json", {"parts": parts, "dtype": "float32"})
    scores = {m: {t: {"value": 0.5, "stderr": 0.25, "n": 4} for t in ("arith", "text")} for m in MODELS}
    scores["S1"]["arith"] = {"value": 0.75, "stderr": 0.25, "n": 4}
    scores["S2"]["text"]["stderr"] = None
    write_json(root / "evaluate" / "scores.json", scores)
    for model in MODELS if items else ():
        right = {"arith": [1, 1, 0, model == "S1"], "text": [1, 0, 1, 0]}
        rows = [{"task": t, "item": i, "value": float(v)} for t, values in right.items() for i, v in enumerate(values)]
        write_table(root / "evaluate" / "items" / f"{model}.parquet", pa.Table.from_pylist(rows))


class Page(html.parser.HTMLParser):
    """Reads a page: tables by caption, tags, attributes, and that every tag is closed in its turn."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.tables, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1]["rows"][-1][-1] += data
        elif self.open and self.open[-1] == "caption":
            self.tables[-1]["caption"] += data

    def table(self, caption):
        found = [table for table in self.tables if table["caption"].startswith(caption)]
        assert len(found) == 1, f"{len(found)} tables {caption!r}"
        return {row[0]: row[1:] for row in found[0]["rows"]}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = make_job(tmp_path_factory.mktemp("run"))
    counts = report.run(job)
    assert counts == (None, len(list(job.folder.iterdir())), 0, 0)
    return job


@pytest.fixture(scope="module")
def text(job):
    return (job.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


@pytest.fixture(scope="module")
def markdown(job):
    return (job.folder / "report.md").read_text(encoding="utf-8")


def test_every_stage_shows_its_own_counts(page, markdown):
    table = page.table("Instructions by stage")
    for stage, counts in COUNTS.items():
        cells = ["–" if count is None else f"{count:,}" for count in counts]
        assert table[stage] == [*cells, "12.3"]
        assert f"| {stage} | {' | '.join(cells)} | 12.3 |" in markdown


def test_reasons_are_grouped(page):
    rows = next(t for t in page.tables if t["caption"].startswith("Why rows went"))["rows"]
    assert ["dedup", "dropped", "near-duplicate", "92", "100.0 %"] in rows
    assert ["collect", "rejected", "broken at column …", "2", "5.6 %"] in rows


def test_shares_follow_the_tables(page):
    sources, languages = page.table("Sources"), page.table("Languages")
    assert sources["dolly"] == ["4", "66.7 %", "4", "66.7 %", "2", "50.0 %"]
    assert sources["belle"] == ["2", "33.3 %", "2", "33.3 %", "2", "50.0 %"]
    assert languages["Chinese"] == ["3", "50.0 %", "3", "50.0 %", "2", "50.0 %"]


def test_data_are_matched_by_source_and_language(page):
    # Rows 0 to 5: sources belle, dolly, dolly, twice; languages zh and en in turns; the first four are in the SFT set.
    matching = page.table("Data matching")
    assert matching["dolly"] == ["2", "2", "0", "1", "1", "0"]
    assert matching["belle"] == ["1", "1", "0", "1", "1", "0"]


def test_labels_have_a_tree_an_audit_and_an_agreement(page, text):
    primary = page.table("Primary categories")
    assert primary["Math"] == ["1", "901", "209"] and primary["其他"] == ["1", "3", "0"]
    tree = re.search(r"<pre[^>]*>(Math  901.*?)</pre>", text, flags=re.DOTALL).group(1)
    assert "\n    Addition  901 &gt; 209\n" in tree and "其他  3 &gt; 0\n    闲聊  3 &gt; 0" in tree
    words = (
        "Of 1,088 labels 77 were read from replies that were cut off at classify.max_new_tokens and 11 from ones that a"
    )
    assert words in page.text
    assert "asked about 24 records of 3 labels and found 75.0 % of the labels right (4 unreadable)" in page.text
    assert list(page.table("Labels that failed the audit").values())[1] == ["187", "2", "6"]
    assert "1 label of which it found less than 50.0 % right went." in page.text
    assert "Rare labels, of fewer than 10 instructions, went (diversify.min_label_count): 1 of 3, with 3" in page.text
    rules = page.table("Rule categories and labels")
    assert rules["math"] == ["Math 100.0 %", "5", "100.0 %"]
    assert "100.0 % of the instructions would have the model's" in page.text


def test_no_figure_is_minus_nothing():
    assert (decimal(-0.0004), decimal(-0.0006)) == ("0.000", "-0.001")
    assert with_error(-0.0004, 0.01, signed=True) == "+0.000 ± 0.010"


def test_agreement_of_two_groupings():
    same = Counter({("a", "x"): 5, ("b", "y"): 3})
    assert agreement(same) == pytest.approx((1, 1))
    independent = Counter({(a, b): m * n for a, m in (("a", 1), ("b", 3)) for b, n in (("x", 2), ("y", 5))})
    assert agreement(independent) == pytest.approx((5 / 7, 0))
    mixed = Counter({("a", "x"): 3, ("a", "y"): 1, ("b", "y"): 4})
    rows, columns = (
        [a for (a, _), n in mixed.items() for _ in range(n)],
        [b for (_, b), n in mixed.items() for _ in range(n)],
    )
    information = sum(
        n / 8 * math.log2((n / 8) / (rows.count(a) / 8 * columns.count(b) / 8)) for (a, b), n in mixed.items()
    )
    spread = [-sum(g.count(v) / 8 * math.log2(g.count(v) / 8) for v in set(g)) for g in (rows, columns)]
    assert agreement(mixed) == pytest.approx((7 / 8, information / (sum(spread) / 2)))


def test_safety_and_winners_by_language(page):
    safety = page.table("Safety by origin")
    assert safety["original"] == ["6", "100.0 %", "0.0 %", "0.0 %"] and safety["small"][-1] == "100.0 %"
    winners = next(t for t in page.tables if t["caption"].startswith("Who wins and who loses, by"))["rows"][1:]
    assert [row[0] for row in winners] == ["Chinese"] * 3 + ["English"] * 3
    assert winners[0] == ["Chinese", "original", "0", "0.0 %", "1", "100.0 %"]
    assert winners[1] == ["Chinese", "large", "2", "100.0 %", "0", "0.0 %"]


def test_ratings_by_origin(page):
    ratings, perplexity = page.table("Ratings by origin"), page.table("Perplexity")
    assert ratings["large"] == ["6", "0", "1.000", "100.0 %", "0.0 %", "0.0 %", "1.000", "0.0 %", "0.0 %"]
    assert ratings["original"] == ["6", "0", "0.500", "0.0 %", "100.0 %", "0.0 %", "1.000", "0.0 %", "0.0 %"]
    assert ratings["small"] == ["6", "6", "–", "–", "–", "–", "0.000", "83.3 %", "16.7 %"]
    assert perplexity["large"] == ["6", "2.000", "4.000", "4.000", "4.000"]
    assert perplexity["small"] == ["0", "–", "–", "–", "–"]
    winners = page.table("Whose replies")
    assert winners["large"][:2] == ["4", "100.0 %"]
    assert winners["original"][2:] == ["2", "100.0 %"]


def test_contamination_names_what_was_not_checked(page):
    found = page.table("Records that hold items")
    assert found["gsm8k"] == ["yes", "1,319", "2", "1", "1"]
    assert [found[name][0] for name in ("mmlu", "cmmlu", "ceval", "humaneval")] == ["not checked"] * 4
    examples = next(t for t in page.tables if t["caption"].startswith("The 2 findings that hold most"))["rows"]
    assert [row[-1] for row in examples[1:]] == ["100.0 %", "50.0 %"]


def test_scores_stand_with_their_errors(page):
    table = page.table("Scores")
    assert table["base"] == ["0.500 ± 0.250", "0.500 ± 0.250", "0.500 ± 0.177"]
    assert table["S1"][0] == "0.750 ± 0.250"
    assert table["S2"][1:] == ["0.500", "0.500"]  # one task has no error, so the mean has none
    assert table["items"] == ["4", "4", "–"]


def test_differences_are_paired_by_item(page):
    # S1 gains one of four items: differences 0, 0, 0, 1 have a standard deviation of 0.5, so an error of 0.25.
    assert page.table("Difference to the base")["S1"] == ["+0.250 ± 0.250", "+0.000 ± 0.000", "+0.125 ± 0.125"]


def test_without_items_differences_are_of_independent_samples(tmp_path):
    job = make_job(tmp_path, items=False)
    table = Page(render(job)).table("Difference to the base")
    assert table["S1"][0] == "+0.250 ± 0.354"  # sqrt(0.25^2 + 0.25^2)
    assert table["S2"][1] == "+0.000"


def render(job, form=render_html):
    return form(build_document(RunFolder(job.run_dir, job.recipe, job.inputs), None))


def test_sets_training_fusion_and_choices(page, markdown):
    sizes = page.table("Sizes")
    assert (sizes["SFT rows"], sizes["KTO rows"], sizes["positives for each negative"]) == (["246"], ["369"], ["2.00"])
    assert page.table("The three trainings")["loss, first step"] == ["2.0000"] * 3
    assert page.table("Fusion")["S1"] == ["0.3333", "d" * 32]
    for words in ("undesirable weight of 1.5", "Evaluated in float32 with our harness", "slmfast run"):
        assert words in page.text
        assert words in markdown


def test_the_precision_told_is_that_of_the_evaluation(job):
    low = dataclasses.replace(job.recipe, evaluate=dataclasses.replace(job.recipe.evaluate, dtype="bfloat16"))
    markdown = render(dataclasses.replace(job, recipe=low), render_markdown)
    assert markdown.count("valuated in bfloat16 with our harness") == 2 and "evaluated in fp32" not in markdown


def test_the_note_stands_before_all_figures(text, markdown):
    shown = "These figures mean nothing as quality &lt;b&gt;."
    assert text.index(shown) < text.index("<table")
    assert markdown.index("> **These figures mean nothing as quality") < markdown.index("| ---")


def test_hostile_text_is_only_text(page, text, markdown):
    assert not set(page.tags) & {"script", "img", "iframe", "object", "embed", "base", "form"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "&lt;script src=" in text
    assert "\x07" not in text and "\x07" not in markdown
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "evil" in outside
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(", outside)


def test_nothing_is_loaded_from_anywhere(page, text):
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href", "background"):
            assert value.startswith("#") or value == "data:,", f"{name}={value}"
        assert "url(" not in (value or "") or "url(#" in value
    assert "@import" not in text and "default-src 'none'" in text


def test_every_drawing_is_there_and_whole(page, text):
    # sources, two matchings, labels, quality, perplexity, winners, two losses, two rewards, scores
    assert page.tags.count("svg") == page.tags.count("figure") == 12
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    used = {value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)
    assert "currentColor" in text and "#0a0b" not in text


def test_chinese_labels_stay_text(page, text):
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert any("其他-闲聊</text>" in drawing for drawing in drawings)
    assert not page.open


def test_the_same_run_gives_the_same_page(job, text):
    assert render(job) == text


def test_other_settings_and_figures_make_another_page(tmp_path):
    """Even where no data depend on them: the page shows the whole recipe, and what every manifest says."""
    job = make_job(tmp_path)
    batches = dataclasses.replace(job.recipe.evaluate, batch_size=7)
    other = dataclasses.replace(job, recipe=dataclasses.replace(job.recipe, evaluate=batches))
    before = report.files(job)
    assert report.files(other) != before and report.files(job) == before
    manifest = job.inputs["rate"] / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"seconds": 1234.5}))
    assert report.files(job) != before


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    job = make_job(tmp_path, stages=("collect",), note=None)
    for stage in ("train", "fuse", "evaluate", "dedup"):
        shutil.rmtree(tmp_path / stage)
    page = Page(render(job))
    assert page.table("Instructions by stage")["collect"][0] == "1,237"
    assert "role" not in dict(page.attributes) or "note" not in [v for k, v in page.attributes if k == "role"]
    assert "Scores" not in render(job, render_markdown)


def test_no_score_board_without_a_world(job):
    assert "scoreboard" not in job.notes


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_overflow(text, browser, width):
    content, frame, drawings, flat = browser(text, width)
    assert frame <= width
    assert content <= frame
    assert (drawings, flat) == (12, 0)
