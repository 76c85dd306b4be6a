"""simhash: character 4-grams of letters and ideographs, MD5, numpy; on one thread."""

from typing import Any

import numpy as np
from protocol import read_texts, serve, timed, with_features
from simhash import Simhash


def fingerprints(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """As protocol.with_features."""
    texts = read_texts(request["input"])["text"].to_pylist()
    seconds, values = timed(lambda: [Simhash(text).value for text in texts])
    return seconds, with_features(np.array(values, dtype=np.uint64), Simhash("").value)


serve("simhash", {"fingerprints": fingerprints})
