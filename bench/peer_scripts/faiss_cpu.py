"""faiss-cpu: IndexBinaryMultiHash, built and searched for every row."""

from typing import Any

import faiss
import numpy as np
from protocol import serve, timed


def join(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """int64[2, m]: the pairs of rows.

    Exact where hashes * (flips + 1) > k: k bits can't put more than `flips` errors into every one of the hashes.
    """
    values = np.load(request["input"])
    codes = values.view(np.uint8).reshape(-1, 8)
    faiss.omp_set_num_threads(request["threads"])

    def search() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = faiss.IndexBinaryMultiHash(64, request["hashes"], 64 // request["hashes"])
        index.nflip = request["flips"]
        index.add(codes)
        return index.range_search(codes, request["k"] + 1)  # its radius is strict

    seconds, (limits, _, found) = timed(search)
    rows = np.repeat(np.arange(len(values)), np.diff(limits.astype(np.int64)))
    later = rows < found
    return seconds, np.stack([rows[later], found[later]])


serve("faiss-cpu", {"join": join})
