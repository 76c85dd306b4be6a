"""HumanEval (Chen et al. 2021, "Evaluating large language models trained on code"): programs that a model writes, run.

lm-eval's own task loads its metric from a hub when it is imported, and runs programs without a sandbox. This is the
same task, prompt and end of a program, with the running left to `slmfast.sandbox`.
"""

from typing import Any

SECONDS = 10.0  # that a program may take, its tests included
MEMORY = 1 << 30  # bytes that it may take


def program(doc: dict[str, Any], reply: str) -> str:
    """The prompt's function with a reply as its body, and the item's own tests of it."""
    return f"{doc['prompt']}{reply}\n{doc['test']}\ncheck({doc['entry_point']})\n"


def process_results(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """Whether the first reply's program passes its tests, as lm-eval asks: {"pass@1": 0 or 1}."""
    from slmfast.sandbox import run_program

    outcome = run_program(program(doc, replies[0]), seconds=SECONDS, memory_bytes=MEMORY)
    return {"pass@1": float(outcome.passed)}


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
