"""Evaluation through lm-eval: any task that it knows, task files of our own, or a suite with pinned settings.

`language_model` is a model as lm-eval sees it, `generation` how a task wants replies written, `metrics` which figure is
its score, `suite` the paper's five benchmarks with `local_items` to read them from files and `humaneval` to run what
was written, `paired` the differences between models. Models are evaluated in fp32 unless asked otherwise.
"""

from slmfast.evaluation.paired import paired_difference
from slmfast.evaluation.run import Evaluation, evaluate_model
from slmfast.evaluation.task_files import task_files, task_folder

__all__ = ["Evaluation", "evaluate_model", "paired_difference", "task_files", "task_folder"]
