"""HumanEval as an lm-eval task of our own (Chen et al. 2021, "Evaluating large language models trained on code").

lm-eval's own task loads its metric from a hub when it is imported, and runs programs without a sandbox. This has its
prompts, stop strings and score, pass@1 of one greedy reply, and leaves the running to `slmfast.humaneval`.
"""

from typing import Any

from slmfast.humaneval import check_completion


def process_results(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Whether the first reply, behind the prompt, passes the item's tests, as lm-eval asks: {"pass@1": 0 or 1}."""
    return {"pass@1": float(check_completion(doc, replies[0]).passed)}


TASK: dict[str, Any] = {
    "task": "humaneval",
    "dataset_path": "openai/openai_humaneval",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{test}}\ncheck({{entry_point}})",
    # What follows a function at the margin is no part of it.
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    "process_results": process_results,
    "metadata": {"version": 1.0},
}
