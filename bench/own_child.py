"""Runs bench/measured_child.py or another script: work that needs a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHILD = Path(__file__).parent / "measured_child.py"


class ChildFailed(Exception):
    """Our own process gave no figure (it may have been killed for its memory); the message says why, in one line."""


def measured(
    *arguments: object, environment: Mapping[str, str] | None = None, script: Path | None = None
) -> dict[str, Any]:
    """The line of JSON that the child printed for these arguments, with `environment` added to ours.

    `script` is another one than bench/measured_child.py; the JSON is the last line that it prints.

    Raises:
        ChildFailed: it ended with another code than 0, with the last line that it said.
    """
    done = subprocess.run(
        [sys.executable, str(script or CHILD), *map(str, arguments)],
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ChildFailed(f"our process ended with code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    sys.stderr.write(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
