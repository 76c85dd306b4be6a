"""What the engine on a server costs beside the waiting: regenerate through a server that answers a fixed rate.

    python bench/engine_overhead.py [--requests 4000] [--rate 200]

The server (tests/engines/openai_server.py) holds SLOTS replies at a time, each for as long as gives `rate` replies a
second, and answers from a process of its own; the stage runs as it does in a run, with its table, its store and its
shards. Printed are the wall time beside requests / rate, what no client could beat, and the CPU time of this process a
request. The last line is one JSON object.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from slmfast import __version__, pipeline
from slmfast.job import Job
from slmfast.recipe import load_recipe
from slmfast.records import RECORD_SCHEMA
from slmfast.store import count_rows

SERVER = Path(__file__).parent.parent / "tests" / "engines" / "openai_server.py"
SLOTS = 64
WORDS = 150  # of a prompt: about the length of a real one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--rate", type=float, default=200.0, help="replies a second of the server")
    arguments = parser.parse_args()
    options = {"slots": SLOTS, "seconds": SLOTS / arguments.rate}
    server = subprocess.Popen([sys.executable, str(SERVER), json.dumps(options)], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        with tempfile.TemporaryDirectory() as folder:
            result = measure(url, Path(folder), arguments.requests)
    finally:
        server.kill()
    ideal = arguments.requests / arguments.rate
    result |= {"ideal_s": ideal, "overhead": result["wall_s"] / ideal - 1}
    print(
        f"{arguments.requests} requests at {arguments.rate:g}/s: {result['wall_s']:.2f} s of wall, {ideal:.2f} s at "
        f"best: {result['overhead']:+.2%}; {result['cpu_ms_a_request']:.2f} ms of CPU a request"
    )
    print(json.dumps({"bench": "engine_overhead", "device": platform.processor(), "version": __version__} | result))


def measure(url: str, folder: Path, requests: int) -> dict[str, float]:
    """Runs regenerate over half as many rows as requests, for two models answer each, and takes the time."""
    write_rows(folder / "diversify" / "records", requests // 2)
    engine = {"kind": "openai", "base_url": url, "model": "served", "tokenizer": "builtin:large", "window": 8192}
    # Both models share the server's slots, so each has more requests ready than its half.
    settings = {role: engine | {"concurrency": SLOTS} for role in ("large", "small")}
    recipe = load_recipe(None, [f"engines={json.dumps(settings)}"])
    output = folder / "regenerate"
    job = Job("regenerate", recipe, folder, output, {"diversify": folder / "diversify"})
    pipeline.job_key(job)  # imports and hashes now: a run of days does not notice them
    from slmfast.engines import openai  # noqa: F401

    start, before = time.perf_counter(), cpu_seconds()
    pipeline.run_stage(job)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - before
    assert count_rows(output / "records") == requests // 2
    return {"requests": requests, "wall_s": wall, "cpu_s": cpu, "cpu_ms_a_request": cpu / requests * 1000}


def write_rows(folder: Path, rows: int) -> None:
    """A table of rows as diversify leaves them, every prompt another."""
    folder.mkdir(parents=True)
    prompts = [[{"role": "user", "content": f"{n} " + "some words of a prompt " * (WORDS // 5)}] for n in range(rows)]
    columns = {"id": [f"{n:032x}" for n in range(rows)], "source": ["bench"] * rows, "source_row": list(range(rows))}
    columns |= {"language": ["en"] * rows, "source_category": [None] * rows, "prompt": prompts, "reply": ["x"] * rows}
    pq.write_table(pa.table(columns, schema=RECORD_SCHEMA), folder / "part-00000.parquet")


def cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
