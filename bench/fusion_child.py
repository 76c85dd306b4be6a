"""One run of a side of bench/fusion.py, in a process of its own; prints the seconds and the peak memory as JSON.

python fusion_child.py fuse|copy THREADS OUTPUT MODEL=WEIGHT...
"""

import json
import os
import sys
from pathlib import Path

import torch
from peak_memory import peak_resident
from timing import stopwatch

from slmfast.fusion import fuse
from slmfast.model_folder import SINGLE

BUFFER = 1 << 20


def copy(models: list[Path], output: Path) -> None:
    """Reads the weights of all models and writes those of the first, down to the disk."""
    output.mkdir()
    buffer = bytearray(BUFFER)
    with (output / SINGLE).open("wb", buffering=0) as target:
        for model in models:
            with (model / SINGLE).open("rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    if model == models[0]:
                        target.write(memoryview(buffer)[:count])
        os.fsync(target.fileno())


def main() -> None:
    """Runs the side that is asked for."""
    side, threads, output, *weights = sys.argv[1:]
    torch.set_num_threads(int(threads))
    models = {path: float(weight) for path, _, weight in (text.rpartition("=") for text in weights)}
    if side == "fuse":
        seconds, _ = stopwatch(lambda: fuse(models, output))
    else:
        seconds, _ = stopwatch(lambda: copy([Path(model) for model in models], Path(output)))
    print(json.dumps({"seconds": seconds, "peak_bytes": peak_resident()}))


if __name__ == "__main__":
    main()
