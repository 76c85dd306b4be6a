"""The study's page: what was found, the paper's tables and figures, samples, and how to do it again."""

import dataclasses
from typing import Any

from slmfast import __version__
from slmfast.evaluation.run import described
from slmfast.recipe import STAGES, TRAINED, dump_recipe
from slmfast.reporting.document import Block, Code, Document, Example, Reply, Section, Table, Text, shortened
from slmfast.reporting.provenance_section import environment, method_section
from slmfast.reporting.run_folder import RunFolder
from slmfast.reporting.training_section import trainings_table
from slmfast.study import drawings, tables
from slmfast.study.batch_size import in_words
from slmfast.study.plan import FUSED, PAPER_RATES, Plan, written
from slmfast.study.results import Results
from slmfast.study.runs import SHARED, seed_folder

METHODS = {
    "S1": ("SFT", "4-1", "4-2"),
    "S2": ("KTO", "4-2", "4-4"),
    "S3": ("SFT, then KTO", "4-3", "4-6"),
    FUSED: ("fusion", "4-4", "4-7"),
}
REPLY_CHARACTERS = 800


def build_page(
    plan: Plan, results: Results, study: dict[str, Any], samples: list[dict[str, Any]], folder: Any
) -> Document:
    """The whole page.

    Args:
        study: what study.json holds.
        samples: as `samples.answer_samples` gives them.
        folder: the study's.
    """
    first = seed_folder(folder, plan.seeds[0])
    run = RunFolder(first, plan.seeded(plan.seeds[0]), {stage: first / stage for stage in STAGES})
    published = study["paper"]
    sections = [
        _summary(plan, results, study),
        *(_single(results, model, published, plan.recipe.seed) for model in METHODS),
        _fusion(plan, results),
        *([_rates(plan, results, study)] if plan.rates else []),
        _differences(study),
        _training(plan, run, folder),
        *([_samples(samples)] if samples else []),
        _method(plan, results),
        method_section(run),
        _provenance(plan, study, run),
    ]
    title = plan.recipe.report.title
    return Document(
        title=f"Study: {title}",
        subtitle=f"Recipe {plan.recipe.name}, seeds {', '.join(map(str, plan.seeds))}, by slmfast {__version__}.",
        note=plan.recipe.report.note,
        sections=sections,
    )


def _summary(plan: Plan, results: Results, study: dict[str, Any]) -> Section:
    rows = []
    for claim in study["claims"]:
        seeds = "–" if claim["stderr_seeds"] is None else f"{100 * claim['stderr_seeds']:.1f}"
        figures = [f"{100 * claim['value']:+.1f}", seeds, f"{100 * claim['stderr_items']:.1f}"]
        interval = f"{100 * claim['low']:+.1f} to {100 * claim['high']:+.1f}"
        rows.append([claim["statement"], "yes" if claim["holds"] else "no", *figures, interval])
    header = ["statement", "holds", "points", "± over seeds", "± over items", "95 % over items"]
    blocks: list[Block] = [
        Text(
            "The paper's statements, by the mean over all tasks. One holds if the difference is above its standard "
            "error, that of seeds and items together (the root of their squares)."
        ),
        Table("The statements", header, rows, 2),
        *(Text(claim["words"]) for claim in study["claims"]),
        *([Text(study["better_rates"])] if study["better_rates"] else []),
        tables.overview(results, study["paper"]),
        drawings.overview(results),
    ]
    if study["paper"]:
        blocks.append(
            Text(
                "The paper's scores were measured with its own harness, and its base scores are those of the model's "
                "card: compare differences, not levels."
            )
        )
    return Section("In short", blocks)


def _single(results: Results, model: str, published: dict[str, Any], seed: int) -> Section:
    method, table, figure = METHODS[model]
    name = model if model == FUSED else f"{model}, {method},"
    blocks = [
        tables.against_base(results, model, f"Table {table}: {name} against the base", published, seed),
        drawings.against_base(results, model, f"Figure {figure}: {name} against the base", published),
    ]
    title = "The fused model" if model == FUSED else f"{model}: {method}"
    return Section(title, blocks)


def _fusion(plan: Plan, results: Results) -> Section:
    words = (
        "Averages of the weights of S1, S2 and S3. The weights were set beforehand, and none was chosen by these "
        "scores: whoever takes the best of several mixes by the items of a test has fitted the test. slmfast fuse "
        "--search chooses on a development split."
    )
    return Section("Fusion weights", [Text(words), tables.mixes(plan, results), drawings.mixes(plan, results)])


def _rates(plan: Plan, results: Results, study: dict[str, Any]) -> Section:
    blocks: list[Block] = []
    own, paper = plan.recipe.train.S1, PAPER_RATES[-1][0]
    if any(rate.paper for rate in plan.rates):
        given = ", ".join(f"{written(rate)} (batch {samples:,})" for rate, samples in PAPER_RATES)
        words = f"The paper tries SFT at {given}."
        if own.learning_rate != paper:
            words += (
                f" This recipe trains a much smaller model at {written(own.learning_rate)}, so its rates are the "
                f"paper's times {own.learning_rate / paper:,.0f}: the same ratios, and the batches in the same ratios "
                "too, as far as whole groups allow."
            )
        blocks.append(Text(words))
    blocks += [tables.rates(plan, results), drawings.rates(plan, results)]
    if study["batch_size"]:
        blocks.append(Text(in_words(study["batch_size"], own.effective_batch)))
    return Section("Learning rates and batch size", blocks)


def _differences(study: dict[str, Any]) -> Section:
    words = (
        "Each is taken seed by seed and item by item, so what both models get wrong alike is no noise. Many pairs are "
        "compared here: of twenty differences that are none, one is expected beyond twice its error. study.json has "
        "the two errors apart, and the intervals over items."
    )
    return Section("Differences", [Text(words), tables.differences(study["differences"])])


def _training(plan: Plan, run: RunFolder, folder: Any) -> Section:
    table = trainings_table(run)
    table = dataclasses.replace(table, caption=f"{table.caption} of seed {plan.seeds[0]}")
    return Section("Training", [table, *drawings.losses(plan, [seed_folder(folder, seed) for seed in plan.seeds])])


def _samples(samples: list[dict[str, Any]]) -> Section:
    examples = [
        Example(
            f"{sample['label']} ({sample['source']}, {sample['language']})",
            shortened(sample["prompt"], REPLY_CHARACTERS),
            [Reply(", ".join(models), shortened(text, REPLY_CHARACTERS), "") for text, models in _alike(sample)],
        )
        for sample in samples
    ]
    words = (
        f"{len(examples)} instructions that are in none of the first seed's training sets, chosen by a hash of their "
        "ids and the seed, not by hand. The replies are greedy, in fp32."
    )
    return Section("Samples", [Text(words), *examples])


def _alike(sample: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The different replies to a sample, each with the models that gave it."""
    models: dict[str, list[str]] = {}
    for model, text in sample["replies"].items():
        models.setdefault(text, []).append(model)
    return list(models.items())


def _method(plan: Plan, results: Results) -> Section:
    shared = STAGES[: STAGES.index(plan.vary_from)]
    parts = [
        f"{len(plan.seeds)} seeds share the stages {', '.join(shared)}; from {plan.vary_from} on each has its own: the "
        "records drawn, the sets made of them, and the order of training. The base model and the benchmarks' items are "
        "the same for all.",
        "± is a standard error: the standard deviation over seeds by the root of their number. With a few seeds it is "
        "itself uncertain: of three, the true one may well be half or twice as large.",
        "The intervals over items are a paired bootstrap: 10,000 times as many items are drawn anew, the same ones for "
        "both models, with each item's value averaged over the seeds. They hold 95 % of the differences.",
        f"All models answer the same items with our harness (lm-eval): {described(plan.recipe.evaluate)}.",
    ]
    return Section("How the errors are made", [*map(Text, parts), tables.by_seed(results)])


def _provenance(plan: Plan, study: dict[str, Any], run: RunFolder) -> Section:
    name = plan.recipe.name
    tasks = [[task, str(told["shots"]), told["metric"], told["filter"]] for task, told in study["evaluation"].items()]
    folders = [[SHARED, "the stages that all seeds share"]]
    folders += [[f"seed-{seed}", f"seed {seed}: a whole run, with its own report in report/"] for seed in plan.seeds]
    roles = [[role, plan.recipe.model_name(role)] for role in ("base", "large", "small")]
    blocks: list[Block] = [
        Text(
            "The study's folder holds recipe.yaml, the same text as the settings below, study.json with every figure, "
            f"and the runs. Every model ({', '.join(TRAINED)}, fused, the mixes and the rates) lies there as a "
            "complete folder with a card. The same recipe and seeds give the same bytes on the same machine, with the "
            "same versions and number of threads."
        ),
        Code("How to reproduce", f"slmfast study recipe.yaml {study['arguments']} --run-dir {name}-study-again"),
        Table("What lies where", ["folder", "what it is"], folders, 2),
        Table("Models", ["role", "model"], [*roles, ["judge, and perplexity", run.judge_name()]], 2),
        Table("Evaluation", ["task", "worked examples", "metric", "filter"], tasks),
        Table("Environment", ["what", "how it stands"], environment(run), 2),
        Code("Settings: the whole recipe", dump_recipe(plan.recipe), folded=True),
    ]
    return Section("Settings and reproduction", blocks)
