"""This machine: what it offers, and how fast it is beside peers."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

from slmfast.errors import UserError


def doctor(arguments: Namespace) -> None:
    """Says what this machine offers, and how a model would be scored on it."""
    from slmfast.doctor import findings

    for name, text in findings(arguments.model):
        print(f"{name:<22}{text}")


def bench(arguments: Namespace) -> int:
    """Runs a benchmark from the source tree: benchmarks are not part of the installed package."""
    script = Path(__file__).parents[2] / "bench" / f"{arguments.what}.py"
    if not script.exists():
        raise UserError("benchmarks run from a source checkout: clone the repository and install it with make install")
    spec = importlib.util.spec_from_file_location(f"slmfast_bench_{arguments.what}", script)
    if spec is None or spec.loader is None:
        raise UserError(f"{script} can't be loaded: the checkout is damaged")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main(arguments.rest) or 0
