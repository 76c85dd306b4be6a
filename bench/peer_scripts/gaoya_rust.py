"""gaoya: character 3-grams of the lower-case text, SipHash, on as many threads as asked."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from protocol import read_texts, serve, timed, with_features

os.environ["RAYON_NUM_THREADS"] = str(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["threads"])

from gaoya.simhash import SimHashStringIndex


def fingerprints(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """As protocol.with_features."""
    texts = read_texts(request["input"])["text"].to_pylist()
    hasher = SimHashStringIndex(64, 6, 5, "char", True, (3, 3)).index  # blocks and distance: of its search alone
    seconds, values = timed(lambda: hasher.par_bulk_doc2signatures(texts))
    return seconds, with_features(np.array(values, dtype=np.uint64), hasher.doc2signature(""))


serve("gaoya", {"fingerprints": fingerprints})
