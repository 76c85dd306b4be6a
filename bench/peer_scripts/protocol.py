"""What every peer script does alike: read the request, run the task, write the answer, print one line of JSON.

Called as `python <script>.py request.json`. The request names the task, the files of the input and the output, and the
task's settings. A task prepares its input, times only its own hot call, and returns (seconds, answer). Depends on
numpy and pyarrow alone, because it runs in the peer's environment, where slmfast is not installed.
"""

import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

Task = Callable[[dict[str, Any]], tuple[float, np.ndarray]]


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """The wall time of one call in seconds, and what it gave."""
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def read_texts(path: str) -> pa.Table:
    """The Arrow table of one column `text` that the benchmark wrote."""
    with pa.OSFile(path) as file:
        return pa.ipc.open_file(file).read_all()


def with_features(values: np.ndarray, of_empty_text: int) -> np.ndarray:
    """uint64[2, n]: the fingerprints, and 1 where a text has features (0: it is hashed as the empty text is)."""
    return np.stack([values, (values != np.uint64(of_empty_text)).astype(np.uint64)])


def serve(package: str, tasks: dict[str, Task]) -> None:
    """Runs the task that the request on the command line names; a failure leaves a traceback and a non-zero exit."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    seconds, answer = tasks[request["task"]](request)
    np.save(request["output"], answer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "version": importlib.metadata.version(package), "peak_bytes": peak}))
