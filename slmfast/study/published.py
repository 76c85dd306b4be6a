"""The paper's own scores, in points of a hundred, which stand beside ours where its recipe runs.

They were measured with the paper's harness; its base scores are those of the base model's card. So differences to the
base compare, levels hardly.
"""

from slmfast.recipe import Recipe

BASE_MODEL = "Qwen2-0.5B-Instruct"
SCORES: dict[str, dict[str, float]] = {
    "mmlu": {"base": 37.9, "S1": 39.07, "S2": 38.74, "S3": 39.32},
    "cmmlu": {"base": 45.48, "S1": 45.80, "S2": 46.84, "S3": 47.4},
    "ceval-valid": {"base": 45.2, "S1": 49.52, "S2": 49.42, "S3": 50.16},
    "humaneval": {"base": 17.1, "S1": 27.44, "S2": 27.44, "S3": 28.05},
    "gsm8k": {"base": 40.1, "S1": 42.00, "S2": 41.17, "S3": 42.5},
}


def published_scores(recipe: Recipe, tasks: list[str]) -> dict[str, dict[str, float]]:
    """The paper's scores {task: {model: points}} of those of the tasks that it has, for a recipe with its base model.

    Nothing for any other: a number of one model says nothing beside another's.
    """
    name = recipe.models.base.partition("@")[0].rstrip("/").rpartition("/")[2]
    return {task: SCORES[task] for task in tasks if task in SCORES} if name == BASE_MODEL else {}
