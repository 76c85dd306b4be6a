"""py-data-juicer: its `document_simhash_deduplicator` over character 3-grams of the lower-case text."""

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import numpy as np
from data_juicer.core.data import NestedDataset
from data_juicer.ops.deduplicator.document_simhash_deduplicator import DocumentSimhashDeduplicator
from datasets import Dataset
from protocol import read_texts, serve, timed, with_features


def operator(k: int, blocks: int) -> DocumentSimhashDeduplicator:
    """The operator with its setting for Chinese, and our length of grams."""
    return DocumentSimhashDeduplicator(
        tokenization="character", window_size=3, lowercase=True, num_blocks=blocks, hamming_distance=k
    )


def fingerprints(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """As protocol.with_features."""
    texts = read_texts(request["input"])["text"].to_pylist()
    hashed = operator(3, 6).compute_hash
    name = "__dj__simhash"
    seconds, values = timed(lambda: [int(hashed({"text": text})[name]) for text in texts])
    return seconds, with_features(np.array(values, dtype=np.uint64), int(hashed({"text": ""})[name]))


def dedup(request: dict[str, Any]) -> tuple[float, np.ndarray]:
    """bool[n]: the rows that stay, from the hashing to the filtered data set."""
    table = read_texts(request["input"])
    table = table.append_column("row", [np.arange(len(table))])
    dataset = NestedDataset(Dataset(table))
    chosen = operator(request["k"], request["blocks"])
    processes = request["processes"] if request["processes"] > 1 else None

    def run() -> Dataset:
        hashed = dataset.map(chosen.compute_hash, num_proc=processes, load_from_cache_file=False)
        return chosen.process(hashed)[0]

    seconds, kept = timed(run)
    keep = np.zeros(len(table), dtype=bool)
    keep[np.array(kept["row"])] = True
    return seconds, keep


if __name__ == "__main__":  # its worker processes import this file again
    serve("py-data-juicer", {"fingerprints": fingerprints, "dedup": dedup})
