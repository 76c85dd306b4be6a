"""HumanEval's verdict on one completion (Chen et al., arXiv 2107.03374), given in the sandbox."""

from collections.abc import Mapping

from slmfast.sandbox import Outcome, run_program

SECONDS = 10.0  # of a problem's tests by the clock; canonical solutions take far less than one


def check_completion(problem: Mapping[str, str], completion: str, *, seconds: float = SECONDS) -> Outcome:
    """Runs what a model wrote after a problem's prompt against the problem's tests.

    Args:
        problem: a row of the data set: `prompt`, `test`, which defines check(candidate), and `entry_point`.
        completion: the text that follows the prompt.
        seconds: for all tests together.

    Raises:
        UserError: there is no sandbox on this machine (`slmfast.sandbox.check_sandbox`).
    """
    name = problem["entry_point"]
    return run_program(
        problem["prompt"] + completion,
        tests=f"{problem['test']}\ncheck({name})\n",
        entry_point=name,
        preamble=problem["prompt"],  # some tests use a function that the prompt defines beside the one asked for
        seconds=seconds,
    )
