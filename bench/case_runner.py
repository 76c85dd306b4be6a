"""What runs the cases of a benchmark, and what a case notes that gives no figure."""

import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from result_table import Result, document, table, write_document

from slmfast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Progress, and who gave no figure."""

    started: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)
    """What gave no figure, and why: named below the tables."""
    broken: list[str] = field(default_factory=list)
    """Those of the failures that are our own side's: with any the exit code is 1."""

    def say(self, text: str) -> None:
        """A line of progress on the standard error stream, with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def fail(self, task: str, why: object, *, ours: bool) -> None:
        """Notes that one side gave no figure for a task; the other figures are still to be taken."""
        self.say(f"{task}: {why}")
        self.failures.append(f"{task}: {why}")
        if ours:
            self.broken.append(task)


def run_cases(
    cases: Mapping[str, Callable[[Any], Iterator[Result]]],
    context: Notes,
    names: Sequence[str],
    done: Callable[[list[Result]], None],
) -> list[Result]:
    """Runs those of the cases that are named, prints each one's table when it is done and tells `done` of all rows.

    A case that fails keeps the rows it has, is noted in the context, and does not keep the others from running.
    """
    results: list[Result] = []
    for name, case in cases.items():
        if name in names:
            rows: list[Result] = []
            try:
                for row in case(context):
                    rows.append(row)
            except Exception as error:  # whatever it is, the figures taken before must not be lost with it
                if isinstance(error, UserError) and not results:
                    raise
                traceback.print_exc()
                context.fail(name, f"{type(error).__name__}: {error}".splitlines()[0], ours=True)
            results += rows
            if rows:
                print(f"{name}\n{table(rows)}\n", flush=True)
            done(results)
    return results


def run_bench(
    bench: str,
    cases: Mapping[str, Callable[[Any], Iterator[Result]]],
    context: Notes,
    options: Namespace,
    on: str | None = None,
    *,
    empty_fails: bool = False,
) -> int:
    """Runs the cases that --case names, all by default, and prints what gave no figure and the line of JSON.

    The line goes to --out, too, after every case: a run that is stopped leaves what it has.

    Args:
        options: with `case`, `out` and `threads`.
        on: names the device where it is not the processor.
        empty_fails: whether it is a failure, too, that there is no figure at all.

    Returns:
        The exit code: 1 if any answer that should be the same was not, or if our own side failed.
    """

    def text(results: list[Result]) -> str:
        return document(bench, options.threads, results, on)

    def keep(results: list[Result]) -> None:
        if options.out:
            write_document(options.out, text(results))

    results = run_cases(cases, context, options.case or list(cases), keep)
    for failure in context.failures:
        print(f"no figure: {failure}")
    print(text(results))
    differs = any(result.same_answer is False for result in results)
    return 1 if differs or context.broken or (empty_fails and not results) else 0
