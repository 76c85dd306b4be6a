"""A whole study, from its plan to its page."""

from pathlib import Path
from typing import Any

from slmfast import __version__, pipeline
from slmfast.recipe import TRAINED
from slmfast.reporting.html_page import render_html
from slmfast.reporting.markdown_page import render_markdown
from slmfast.store import atomic_path, read_json, write_json
from slmfast.study.batch_size import expected_batch
from slmfast.study.claims import better_rates, claims, training_facts
from slmfast.study.errors import difference, seed_mean
from slmfast.study.page import build_page
from slmfast.study.plan import BASE, MODELS, Plan
from slmfast.study.published import published_scores
from slmfast.study.results import MEAN, Results, read_results
from slmfast.study.runs import make_models, seed_folder, study_folder
from slmfast.study.samples import answer_samples

STUDY = "study.json"


def run_study(plan: Plan, folder: Path, arguments: str = "") -> dict[str, Any]:
    """Makes what is missing of a study, and writes study.json, report.html and report.md; gives what study.json holds.

    Killed at any instant and called again it goes on, and ends with the same models and figures.

    Args:
        arguments: those of the command line, for the page's word on how to reproduce it.

    Raises:
        UserError: whatever a run may raise, and a folder that holds something else.
    """
    with study_folder(folder):
        make_models(plan, folder)
        results = read_results(plan, folder)
        study = describe(plan, results, folder) | {"arguments": arguments, "report": str(folder / "report.html")}
        first = plan.seeds[0]
        samples = answer_samples(plan.seeded(first), seed_folder(folder, first), folder / "samples.json")
        document = build_page(plan, results, study, samples, folder)
        for name, text in {"report.html": render_html(document), "report.md": render_markdown(document)}.items():
            with atomic_path(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(folder / STUDY, study)
    return study


def describe(plan: Plan, results: Results, folder: Path) -> dict[str, Any]:
    """Every figure of a study, scores as shares of one."""
    seed = plan.recipe.seed
    folders = [seed_folder(folder, each) for each in plan.seeds]
    base = Path(pipeline.make_job("train", plan.recipe, folders[0]).model("base"))
    tasks = [*results.tasks, MEAN]
    means = {
        model: {task: seed_mean(results.values(model, task))._asdict() for task in tasks} for model in results.models
    }
    pairs = [(model, BASE) for model in results.models if model != BASE] + [("S3", "S1")]
    pairs += [("fused", single) for single in TRAINED]
    differences = [
        {"model": model, "less": less, "task": task, **difference(results, model, less, task, seed)._asdict()}
        for model, less in pairs
        for task in tasks
    ]
    facts = training_facts(folders, base)
    return {
        "recipe": plan.recipe.name,
        "version": __version__,
        "seeds": list(plan.seeds),
        "vary_from": plan.vary_from,
        "tasks": results.tasks,
        "claims": claims(results, seed, facts),
        "better_rates": better_rates(plan, results, seed),
        "means": means,
        "scores": {str(each): scores for each, scores in results.scores.items()},
        "differences": differences,
        "mixes": plan.mixes,
        "rates": [
            {
                "model": rate.name,
                "learning_rate": rate.settings.learning_rate,
                "samples": rate.settings.effective_batch,
                "paper": rate.paper,
            }
            for rate in plan.rates
        ],
        "batch_size": expected_batch(read_json(folders[0] / "train" / "S1" / "training_log.json")),
        "training": facts,
        "paper": published_scores(plan.recipe, results.tasks),
        "evaluation": read_json(folders[0] / "evaluate" / "settings.json"),
        "models": {str(each): _folders(plan, base, path) for each, path in zip(plan.seeds, folders, strict=True)},
    }


def _folders(plan: Plan, base: Path, run_dir: Path) -> dict[str, str]:
    """Where every model of one seed lies."""
    found = {BASE: base} | {name: run_dir / "train" / name for name in TRAINED}
    found |= {"fused": run_dir / "fuse" / "fused"} | {name: run_dir / "fusions" / name for name in plan.mixes}
    found |= {name: run_dir / "rates" / name for name in plan.models if name not in (*MODELS, *plan.mixes)}
    return {name: str(path) for name, path in found.items()}
