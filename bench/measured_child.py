"""Work that needs a process of its own: a join whose peak memory is taken, and fingerprints under SLMFAST_ISA.

python measured_child.py join N K THREADS SEED            prints one line of JSON
python measured_child.py fingerprints INPUT OUTPUT THREADS RUNS    prints the seconds as JSON
"""

import json
import sys

import numpy as np
import pyarrow as pa
from peak_memory import peak_resident
from timing import best_of, stopwatch

from slmfast.near_duplicates import near_pairs, simhash

CHUNK = 1 << 20
NEIGHBOUR = 1000  # inputs.uniform has ten, and spends memory on so many pairs


def join(n: int, k: int, threads: int, seed: int) -> dict[str, float]:
    """Seconds, and bytes a record beyond what the process held before the join.

    The fingerprints are uniform, with a near neighbour for one row in NEIGHBOUR. They are drawn in place and never
    copied, and the peak is set back before the join: what was needed to make them does not hide what the join needs.
    """
    values = np.empty(n, dtype=np.uint64)
    rng = np.random.default_rng(seed)
    for begin in range(0, n, CHUNK):
        part = values[begin : begin + CHUNK]
        part[:] = rng.integers(0, 2**64, len(part), dtype=np.uint64)
        copies = len(part) // NEIGHBOUR
        part[:copies] = part[copies : 2 * copies] ^ np.uint64(1 << (begin // CHUNK % 64))
    near_pairs(values[:1000], k, threads=threads)  # loads what is loaded at the first call
    before = peak_resident(reset=True)
    seconds, (i, _, _) = stopwatch(lambda: near_pairs(values, k, threads=threads))
    extra = (peak_resident() - before) / n
    return {"n": n, "pairs": len(i), "seconds": seconds, "bytes": extra, "bytes_with_input": extra + values.itemsize}


def fingerprints(source: str, output: str, threads: int, runs: int) -> dict[str, float]:
    """Seconds (the best of `runs`) for texts on the instruction set of SLMFAST_ISA; the fingerprints go to a file."""
    with pa.OSFile(source) as file:
        column = pa.ipc.open_file(file).read_all()["text"]
    seconds, values = best_of(runs, lambda: simhash(column, threads=threads))
    np.save(output, values)
    return {"seconds": seconds}


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    if task == "join":
        found = join(*map(int, rest))
    else:
        found = fingerprints(rest[0], rest[1], int(rest[2]), int(rest[3]))
    print(json.dumps(found))
