"""Ten thousand real replies from a Parquet file, scored by another process: all of them, in bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import slmfast

MODEL = Path(slmfast.__file__).parent / "miniature" / "models" / "small"
REPLIES = 10_000
MOST_LETTERS = 120  # of a prompt or a reply: the model is a small one, and reads most letters as tokens of their own
MOST_GROWTH = 512 << 20  # bytes; the logits of all tokens would take 3 GB

SCRIPT = """
import resource, sys
import pyarrow.parquet as pq, slmfast
from slmfast.scoring.loading import load_model, load_tokenizer

model, tokenizer = load_model(sys.argv[1]), load_tokenizer(sys.argv[1])
slmfast.perplexity(model, tokenizer, ["a"], [["b"]], progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = pq.read_table(sys.argv[2])
scores = slmfast.perplexity(model, tokenizer, table["prompt"], table["replies"])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
pq.write_table(scores, sys.argv[3])
"""


@pytest.mark.slow
def test_ten_thousand_replies_in_bounded_memory(real_data, tmp_path):
    prompts, replies = [], []
    for file in sorted((real_data / "alpaca-bilingual-52k").glob("*.json")):
        for row in json.loads(file.read_text(encoding="utf-8")):
            texts = [row[name] for name in ("zh_instruction", "zh_output", "en_output")]
            if all(text and len(text) <= MOST_LETTERS for text in texts):
                prompts.append(texts[0])
                replies.append(texts[1:])
    prompts, replies = prompts[: REPLIES // 2], replies[: REPLIES // 2]
    assert len(prompts) == REPLIES // 2
    pq.write_table(pa.table({"prompt": prompts, "replies": replies}), tmp_path / "replies.parquet")
    command = [sys.executable, "-c", SCRIPT, str(MODEL), str(tmp_path / "replies.parquet"), str(tmp_path / "scores")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < MOST_GROWTH
    scores = pq.read_table(tmp_path / "scores")
    assert scores["prompt_index"].to_pylist() == [i for i in range(REPLIES // 2) for _ in range(2)]
    assert scores["reply_index"].to_pylist() == [0, 1] * (REPLIES // 2)
    assert scores["bits"].null_count == 0
    some = slice(0, 40)
    again = slmfast.perplexity(str(MODEL), None, prompts[some], replies[some], progress=False)
    assert scores["bits"].to_pylist()[:80] == pytest.approx(again["bits"].to_pylist(), rel=1e-5)
