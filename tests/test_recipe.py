"""Every mistake in a recipe is one line that names the key and what to write instead."""

from pathlib import Path

import pytest

from slmfast.commands import MINIATURE
from slmfast.errors import UserError
from slmfast.recipe import STAGES, Evaluate, dump_recipe, expand, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.mark.parametrize("path", [MINIATURE, *sorted(RECIPES.glob("*.yaml"))], ids=lambda path: path.stem)
def test_recipes_load_and_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    recipe.require_complete()
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_the_papers_recipe_has_the_papers_constants():
    recipe = load_recipe(RECIPES / "paper-3090.yaml")
    rates = [recipe.train.S1.learning_rate, recipe.train.S2.learning_rate, recipe.train.S3.learning_rate]
    assert rates == [5e-8, 1e-8, 3e-8]
    for settings in (recipe.train.S1, recipe.train.S2, recipe.train.S3):
        assert (settings.batch_size, settings.accumulation, settings.warmup_ratio) == (4, 250, 0.005)
        assert (settings.schedule, settings.epochs, settings.max_length, settings.beta) == ("cosine", 6, 2048, 0.1)
    assert (recipe.dedup.k, recipe.diversify.min_label_count, recipe.align.sft_size) == (3, 10, 100_000)
    assert recipe.align.positives_per_negative == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dedup.kk=3", r"dedup\.kk is unknown: did you mean dedup\.k"),
        ("zzzzzz=3", "zzzzzz is unknown: the keys here are name"),
        ("dedup.k=9", r"dedup\.k: give a distance from 0 to 8"),
        ("dedup.k=three", r"dedup\.k: give a whole number"),
        ("dedup.verify=1.5", r"dedup\.verify: give a share"),
        ("dedup=3", "dedup: give a mapping"),
        ("seed=yes", "seed: give a whole number"),
        ("name=a/b", "name: use letters"),
        ("seed=-1", "seed: give a whole number from 0"),
        ("dedup.ngram=0", r"dedup\.ngram: give 1 to 9"),
        ("models.engine=magic", r"models\.engine: use local"),
        ("train.S1.learning_rate=-1", r"train\.S1: learning_rate is -1"),
        ("train.S1.method=kto", "train: S1 is method sft"),
        ("fuse.weights.S9=1", "weigh base, S1, S2 and S3"),
        ("collect.sources=[]", "name at least one source"),
        ("evaluate.tasks=mmlu", r"evaluate\.tasks: give a list"),
        ("classify.sample=0", r"classify\.sample: give a positive number"),
        ("align.sft_size", "write key=value"),
        ("align.sft_size=[", "not YAML"),
        ("name=2024-13-45", "--set name: the value is not YAML"),
        ("fuse.weights={S1: 1, S1: 2}", "not YAML"),
        (f"align.outlier_fences=1{'0' * 400}", r"align\.outlier_fences: give a number"),
        ("models.engine=vllm", r"engines\.judge\.kind: vllm gives no scores here: have the judge run with local"),
        ("name.x=1", "name is not a section"),
        ("align.max_reply_tokens=0", r"align\.max_reply_tokens: give a positive number, or null"),
        ("align.positives_per_negative=.inf", r"align\.positives_per_negative: give a positive number"),
        ("regenerate.temperature=.inf", r"regenerate\.temperature: give zero \(greedy\) or more"),
        ("fuse.weights.S1=.inf", r"fuse\.weights: give weights of zero or more"),
    ],
)
def test_a_wrong_value_names_key_and_remedy(override, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_recipe(MINIATURE, [override]).require_complete()
    assert "\n" not in str(caught.value)


def test_numbers_may_be_written_as_the_paper_writes_them():
    assert load_recipe(MINIATURE, ["train.S1.learning_rate=5e-8"]).train.S1.learning_rate == 5e-8


def test_unreadable_recipes(tmp_path):
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not readable YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "date.yaml").write_text("name: 2024-13-45")
    with pytest.raises(UserError, match=r"date\.yaml is not readable YAML: month must be"):
        load_recipe(tmp_path / "date.yaml")
    (tmp_path / "twice.yaml").write_text("align: {sft_size: 3}\nseed: 1\nalign: {sft_size: 4}\n")
    with pytest.raises(UserError, match=r"twice\.yaml is not readable YAML: key 'align' stands twice .*line 3"):
        load_recipe(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="is not a recipe"):
        load_recipe(tmp_path / "list.yaml")


def test_an_override_changes_one_of_two_aliased_sections(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {S2: &kto {method: kto, learning_rate: 1e-6}, S3: *kto}\n")
    train = load_recipe(path, ["train.S3.learning_rate=1e-7"]).train
    assert (train.S2.learning_rate, train.S3.learning_rate) == (1e-6, 1e-7)


def test_merged_keys_are_no_keys_that_stand_twice(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {S3: &a {method: kto, learning_rate: 1e-6}, S2: {<<: *a, learning_rate: 2e-6}}\n")
    assert load_recipe(path).train.S2.learning_rate == 2e-6


def test_the_recipes_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a #b: [c"
    folder.mkdir()
    (folder / "r.yaml").write_text("evaluate: {tasks: [x], task_folder: '${RECIPE}/tasks'}\n")
    assert load_recipe(folder / "r.yaml").evaluate.task_folder == f"{folder}/tasks"


def test_variables_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("SLMFAST_TEST", "/data")
    assert expand("${RUN}/a ${SLMFAST_TEST}/b", {"RUN": tmp_path}, "k") == f"{tmp_path}/a /data/b"
    monkeypatch.delenv("SLMFAST_TEST")
    with pytest.raises(UserError, match="k needs the environment variable SLMFAST_TEST"):
        expand("${SLMFAST_TEST}", {}, "k")


def test_stages_are_sections():
    recipe = load_recipe(MINIATURE)
    assert all(hasattr(recipe, stage) for stage in STAGES)


def test_a_suites_benchmark_may_be_called_as_people_call_it():
    assert Evaluate(suite="paper", tasks=["ceval", "mmlu", "ceval-valid"]).names == ["ceval-valid", "mmlu"]
    assert Evaluate(tasks=["ceval"]).names == ["ceval"]
