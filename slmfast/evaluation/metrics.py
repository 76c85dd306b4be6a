"""Which of a task's metrics is its score: the first that is a mean over items, and higher where a model is better.

Means over tasks, points of a hundred, the direction of a difference and the paired bootstrap all rest on that; a
perplexity, a BLEU of a whole corpus or an F1 is none.
"""

from typing import Any

from lm_eval.api import metrics

from slmfast.errors import UserError


def score_metric(name: str, loaded: dict[str, Any]) -> str:
    """The name of the metric that is a task's or a group's score.

    Args:
        loaded: tasks and groups, as lm-eval's TaskManager gives them.

    Raises:
        UserError: there is none.
    """
    if name in loaded["groups"]:
        return _of_group(name, loaded["groups"][name])
    if name not in loaded["tasks"]:
        raise UserError(f"task {name} stands for several tasks without a score of its own: name those one by one")
    found = _means(loaded["tasks"][name])
    if not found:
        given = ", ".join(loaded["tasks"][name].aggregation()) or "none at all"
        raise UserError(
            f"task {name} has no metric that is a mean over items and higher where a model is better ({given}): give "
            "its file one such as acc or exact_match, or leave the task out"
        )
    return found[0]


def _of_group(name: str, group: Any) -> str:
    """A group's score is the mean over the items of all its tasks."""
    tasks = group.get_all_tasks()
    weighed = {row.metric for row in group.aggregate_metric_list or () if row.weight_by_size}
    common = [metric for metric in _means(tasks[0]) if metric in weighed and all(metric in _means(t) for t in tasks)]
    if not common:
        raise UserError(
            f"task {name} is a group that has no score which is the mean over the items of all its tasks: name these "
            "one by one"
        )
    return common[0]


def _means(task: Any) -> list[str]:
    better = task.higher_is_better()
    return [metric for metric, how in task.aggregation().items() if how is metrics.mean and better.get(metric)]
