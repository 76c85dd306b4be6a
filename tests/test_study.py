"""A study: its plan, its errors against what can be worked out by hand, its statements, and one small whole one."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from slmfast.errors import UserError
from slmfast.recipe import Recipe, load_recipe
from slmfast.study import batch_size, tables
from slmfast.study.claims import better_rates, claims
from slmfast.study.errors import difference, seed_mean
from slmfast.study.plan import describe, make_plan
from slmfast.study.published import published_scores
from slmfast.study.results import MEAN, Results

ROOT = Path(__file__).parent.parent
MINIATURE = ROOT / "slmfast" / "miniature" / "recipe.yaml"
RANDOM = np.random.default_rng(0)


def results_of(values: dict[str, dict[str, list[list[float]]]]) -> Results:
    """Results from [model][task][seed][item]."""
    models = list(values)
    tasks = list(values[models[0]])
    seeds = tuple(range(len(values[models[0]][tasks[0]])))
    scores = {
        seed: {m: {t: {"value": float(np.mean(values[m][t][seed])), "n": 0} for t in tasks} for m in models}
        for seed in seeds
    }
    items = {
        model: {
            seed: pa.Table.from_pylist(
                [
                    {"task": task, "subset": task, "item": item, "value": float(value)}
                    for task in tasks
                    for item, value in enumerate(values[model][task][seed])
                ]
            )
            for seed in seeds
        }
        for model in models
    }
    return Results(seeds, tasks, scores, items)


def drawn(share: float, items: int) -> list[float]:
    return (RANDOM.random(items) < share).astype(float).tolist()


def test_the_papers_rates_are_taken_as_they_are_and_scaled_in_their_ratios():
    paper = make_plan(load_recipe(ROOT / "recipes" / "paper-3090.yaml"))
    found = [(r.settings.learning_rate, r.settings.effective_batch, r.name == "S1") for r in paper.rates]
    assert found == [(1e-6, 300, False), (1e-7, 1000, False), (5e-8, 1000, True)]
    mini = make_plan(load_recipe(MINIATURE), seeds=4)
    own = mini.recipe.train.S1
    ratios = [rate.settings.learning_rate / own.learning_rate for rate in mini.rates]
    assert ratios == pytest.approx([20, 2, 1])
    assert [rate.settings.effective_batch for rate in mini.rates] == [8, 32, 32]  # 0.3 x 32, in whole groups of 4
    assert "SFT at 0.0006 (batch 8, the paper's 1e-6), 6e-5 (batch 32, the paper's 1e-7)" in describe(mini)
    assert mini.seeds == (0, 1, 2, 3)
    assert mini.own_mix == "equal" and "equal" not in mini.mixes
    assert all(sum(weights.values()) == pytest.approx(1) for weights in mini.mixes.values())


def test_given_rates_stand_beside_the_recipes_own():
    plan = make_plan(load_recipe(MINIATURE), rates=["1e-3@16", "1e-5"])
    assert [rate.name for rate in plan.rates] == ["S1-0.001@16", "S1", "S1-1e-5"]
    assert make_plan(load_recipe(MINIATURE), rates=[]).rates == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rates": ["fast"]}, "--rates fast"),
        ({"rates": ["-1e-3"]}, "--rates -1e-3"),
        ({"rates": ["1e-3@2"]}, "4 samples or more"),
        ({"seeds": 0}, "--seeds 0"),
        ({"vary_from": "fuse"}, "--vary-from fuse"),
    ],
)
def test_a_plan_that_can_not_be_is_one_line(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_plan(load_recipe(MINIATURE), **options)


def test_errors_over_seeds_and_items_are_those_of_the_books():
    a = [drawn(0.7, 400) for _ in range(3)]
    b = [drawn(0.5, 400) for _ in range(3)]
    results = results_of({"a": {"t": a}, "b": {"t": b}})
    found = difference(results, "a", "b", "t")
    by_seed = [np.mean(x) - np.mean(y) for x, y in zip(a, b, strict=True)]
    assert found.value == pytest.approx(np.mean(by_seed))
    assert found.stderr_seeds == pytest.approx(np.std(by_seed, ddof=1) / math.sqrt(3))
    steps = np.mean(a, axis=0) - np.mean(b, axis=0)  # by item, over seeds
    error = steps.std() / math.sqrt(400)
    assert found.stderr_items == pytest.approx(error, rel=0.05)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * error, found.value + 1.96 * error), abs=0.004)
    assert found.stderr == pytest.approx(math.hypot(found.stderr_seeds, found.stderr_items))
    back = difference(results, "b", "a", "t")
    assert back.value == -found.value and back.stderr_items == pytest.approx(found.stderr_items, rel=0.05)


def test_the_mean_weighs_every_task_alike():
    a = {"large": [drawn(0.6, 900)], "small": [drawn(0.9, 50)]}
    b = {"large": [drawn(0.6, 900)], "small": [drawn(0.3, 50)]}
    results = results_of({"a": a, "b": b})
    each = {task: difference(results, "a", "b", task) for task in a}
    found = difference(results, "a", "b", MEAN)
    assert found.value == pytest.approx((each["large"].value + each["small"].value) / 2)
    halves = math.hypot(each["large"].stderr_items, each["small"].stderr_items) / 2
    assert found.stderr_items == pytest.approx(halves, rel=0.05)
    assert found.stderr_seeds is None and found.n == 950  # one seed has no error over seeds


def test_an_item_wants_its_own_twin():
    results = results_of({"a": {"t": [[1.0, 0.0]]}, "b": {"t": [[1.0]]}})
    with pytest.raises(UserError, match="same items"):
        difference(results, "a", "b", "t")


def test_seed_means():
    assert seed_mean([0.5]) == (0.5, None)
    assert seed_mean([0.4, 0.6]) == pytest.approx((0.5, 0.1))


def test_statements_hold_beyond_their_error_and_say_why_not():
    base = [drawn(0.5, 500)] * 3
    better = [[max(x, y) for x, y in zip(base[0], drawn(0.5, 500), strict=True)] for _ in range(3)]
    values = {"base": {"t": base}, "S1": {"t": better}, "S2": {"t": base}, "S3": {"t": better}, "fused": {"t": base}}
    first, second, third = claims(results_of(values), 0, {"S3_update_over_S1": 0.05, "S3_margin": 0.01})
    assert first["holds"] and first["value"] > first["stderr"] > 0
    assert not second["holds"] and second["words"].startswith("S3 answers every item as S1 does.")
    assert "by 5.0% of the distance" in second["words"] and "too little to show" in second["words"]
    assert not third["holds"] and third["less"] == "S1" and "the wrong way" in third["words"]


def test_a_rate_that_does_better_than_s1_is_told():
    plan = make_plan(load_recipe(MINIATURE), rates=["1e-3", "1e-5"])
    worse, better = [[0.0] * 5 + [1.0] * 45] * 2, [[1.0] * 50] * 2
    results = results_of(
        {"S1": {"t": worse}, "S1-0.001": {"t": better}, "S1-1e-5": {"t": worse}, "fused": {"t": better}}
    )
    words = better_rates(plan, results, 0)
    assert words.startswith("S1's rate is not the best for SFT alone: SFT at 0.001 lies 10.0 ± ")
    assert words.endswith("points above it, and 0.0 ± 0.0 above the fused model.") and "1e-5" not in words
    assert better_rates(plan, results_of({name: {"t": better} for name in results.models}), 0) == ""


def test_the_papers_scores_stand_beside_its_own_base_model_alone():
    recipe = load_recipe(ROOT / "recipes" / "paper-3090.yaml")
    found = published_scores(recipe, ["mmlu", "other"])
    assert found == {"mmlu": {"base": 37.9, "S1": 39.07, "S2": 38.74, "S3": 39.32}}
    models = dataclasses.replace(recipe.models, base="Qwen/Qwen2-1.5B-Instruct")
    assert published_scores(dataclasses.replace(recipe, models=models), ["mmlu"]) == {}
    assert published_scores(Recipe(), ["mmlu"]) == {}
    results = results_of({"base": {"mmlu": [[0.0, 1.0]]}, "S1": {"mmlu": [[1.0, 1.0]]}})
    table = tables.against_base(results, "S1", "Table 4-1", found, 0)
    assert list(table.header[-2:]) == ["paper: base", "paper: S1"]
    assert list(table.rows[0][:3]) == ["mmlu", "50.0", "100.0"] and list(table.rows[0][-2:]) == ["37.90", "39.07"]


def test_every_pair_has_a_row_with_both_errors_in_one():
    gap = {"value": 0.05, "stderr_seeds": 0.03, "stderr_items": 0.04}
    more = {"value": -0.01, "stderr_seeds": None, "stderr_items": 0.02}
    pairs = [{"model": "S3", "less": "S1"}, {"model": "S1", "less": "base"}]
    found = [
        pair | {"task": task} | errors
        for pair, errors in zip(pairs, (gap, more), strict=True)
        for task in ("a", "b", MEAN)
    ]
    table = tables.differences(found)
    assert table.header == ["model", "less", "a", "b", MEAN]
    assert table.rows == [["S3", "S1", *["+5.0 ± 5.0"] * 3], ["S1", "base", *["-1.0 ± 2.0"] * 3]]
    assert tables.differences([row for row in found if row["task"] != "b"]).header == ["model", "less", "a"]


def test_critical_batches_follow_the_law():
    assert batch_size.critical_batch(1.0) == pytest.approx(2e8)
    ratio = batch_size.critical_batch(2.0) / batch_size.critical_batch(4.0)
    assert math.log(ratio, 2) == pytest.approx(1 / 0.21)
    log = [{"step": i, "loss": 4.0 if i == 1 else 2.0, "tokens": 100} for i in range(1, 21)]
    found = batch_size.expected_batch(log)
    assert (found["first_loss"], found["last_loss"], found["step_tokens"]) == (4.0, 2.0, 100)
    assert "is below" in batch_size.in_words(found, 8)
    assert batch_size.expected_batch([{"step": 1, "loss": 0.5}]) is None


SMALL = [
    "world.size=400",
    "diversify.target=90",
    "diversify.min_label_count=1",
    "align.sft_size=60",
    *(f"train.{name}.epochs=1" for name in ("S1", "S2", "S3")),
    "evaluate.tasks=[mini_text, mini_compare]",
    "evaluate.limit=6",
    "threads=1",
]
MODELS = ["base", "S1", "S2", "S3", "fused", "S1-heavy", "S2-heavy", "S3-heavy", "S1+S2", "S1-0.001@16"]


def run(folder):
    import torch

    from slmfast.study.run import run_study

    before = torch.get_num_threads()
    try:
        return run_study(make_plan(load_recipe(MINIATURE, SMALL), seeds=2, rates=["1e-3@16"]), folder)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "small"
    return folder, run(folder)


def data_files(folder):
    found = [path for kind in ("parquet", "safetensors", "md") for path in folder.rglob(f"*.{kind}")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.name != "report.md"}


@pytest.mark.slow
def test_a_study_has_every_score_and_shares_what_no_seed_changes(study):
    folder, found = study
    assert found == json.loads((folder / "study.json").read_text())
    assert list(found["means"]) == MODELS
    for seed in ("0", "1"):
        assert set(found["scores"][seed]) == set(MODELS)
        for model, path in found["models"][seed].items():
            assert (Path(path) / "config.json").is_file()
            assert model == "base" or (Path(path) / "README.md").is_file()
    for model, means in found["means"].items():
        each = [found["scores"][seed][model]["mini_text"]["value"] for seed in ("0", "1")]
        assert means["mini_text"]["value"] == pytest.approx(sum(each) / 2)
    assert found["means"]["base"]["mean"]["stderr"] == 0
    assert (folder / "seed-1" / "classify").resolve() == (folder / "shared" / "classify").resolve()
    samples = [(folder / f"seed-{seed}" / "align" / "manifest.json").read_text() for seed in (0, 1)]
    assert json.loads(samples[0])["digest"] != json.loads(samples[1])["digest"]
    assert len(found["claims"]) == 3 and found["paper"] == {}


@pytest.mark.slow
def test_what_is_missing_is_made_again_to_the_same_bytes(study, capsys):
    folder, found = study
    files = data_files(folder)
    run_dir = folder / "seed-1"
    for gone in ("rates/S1-0.001@16", "fusions/S1+S2", "train/S3", "evaluate/items"):
        shutil.rmtree(run_dir / gone)
    (run_dir / "scores" / "S1-heavy.json").unlink()
    (run_dir / "rates" / ".S1.tmp").mkdir()
    assert run(folder) == found
    assert data_files(folder) == files
    said = capsys.readouterr().out
    assert "classify: running" not in said and said.count("train: running") == 1
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_folder_that_holds_something_else_is_refused(study, tmp_path):
    folder, _ = study
    with pytest.raises(UserError, match="holds a run"):
        run(folder / "seed-0")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="other files"):
        run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(study, browser, width):
    text = (study[0] / "report.html").read_text(encoding="utf-8")
    content, frame, drawings, flat = browser(text, width)
    assert content <= frame <= width
    # an overview, four models, mixes, rates, losses, margins
    assert (drawings, flat) == (9, 0)


@pytest.mark.slow
def test_the_page_has_the_papers_tables_and_says_how_to_do_it_again(study):
    folder, _ = study
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for words in ("Table 4-1", "Table 4-2", "Table 4-3", "Table 4-4", "Figure 4-2", "Figure 4-4", "Figure 4-6"):
        assert words in markdown
    for gap in json.loads((folder / "study.json").read_text())["differences"]:
        assert f"\n| {gap['model']} | {gap['less']} | " in markdown
    for words in ("peak learning rate", "mini_text, mini_compare; float32, chat template, greedy; of each task the"):
        assert words in markdown
    assert "slmfast study recipe.yaml" in markdown and "## Samples" in markdown and "Kaplan" in markdown
    assert "src=" not in (folder / "report.html").read_text(encoding="utf-8")
