"""What the engine on a server costs beside the waiting: regenerate through a server that answers a fixed rate.

    python bench/engine_overhead.py [--requests 4000] [--rate 200]

The server (tests/engines/openai_server.py) holds SLOTS replies at a time, each for as long as gives `rate` replies a
second, and answers from a process of its own. Twice in turn a bare loop of aiohttp puts the requests and throws the
answers away, which is what this server and machine allow, and the stage `regenerate` runs as it does in a run, with its
table, its store and its shards. Printed are the wall times, their ratio, and the CPU time of this process a request.
The last line is one JSON object.
"""

import argparse
import asyncio
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
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
        sides: dict[str, list[dict[str, float]]] = {"bare": [], "ours": []}
        for _ in range(2):
            sides["bare"].append(timed(lambda: asyncio.run(bare(url, arguments.requests))))
            with tempfile.TemporaryDirectory() as folder:
                run = prepared(url, Path(folder), arguments.requests)
                sides["ours"].append(timed(run))
                assert count_rows(Path(folder) / "regenerate" / "records") == arguments.requests // 2
    finally:
        server.kill()
    best = {name: min(runs, key=lambda one: one["wall_s"]) for name, runs in sides.items()}
    ratio = best["ours"]["wall_s"] / best["bare"]["wall_s"]
    print(f"{arguments.requests} requests to a server of {arguments.rate:g} replies a second")
    for name, one in best.items():
        cpu = one["cpu_s"] / arguments.requests * 1000
        print(f"{name}: {one['wall_s']:.2f} s of wall, {cpu:.2f} ms of CPU a request")
    print(f"ours / bare: {ratio:.4f}")
    known = {"device": platform.machine(), "version": __version__, "rate": arguments.rate}
    print(json.dumps({"bench": "engine_overhead"} | known | {"requests": arguments.requests, "ratio": ratio} | sides))


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of a call, of this process alone."""
    start, before = time.perf_counter(), cpu_seconds()
    work()
    return {"wall_s": time.perf_counter() - start, "cpu_s": cpu_seconds() - before}


async def bare(url: str, requests: int) -> None:
    """Puts as many requests of the same size, as many at a time, and keeps nothing."""
    slots = asyncio.Semaphore(2 * SLOTS)

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "served", "messages": prompt(number), "max_tokens": 1024, "temperature": 0.0, "seed": number}
        async with slots, session.post(f"{url}/chat/completions", json=body) as answer:
            assert (await answer.json())["choices"]

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2 * SLOTS)) as session:
        await asyncio.gather(*(one(session, number) for number in range(requests)))


def prepared(url: str, folder: Path, requests: int) -> Callable[[], None]:
    """The stage over half as many rows as requests, since two models answer each; what loads once is loaded."""
    write_rows(folder / "diversify" / "records", requests // 2)
    engine = {"kind": "openai", "base_url": url, "model": "served", "tokenizer": "builtin:large", "window": 8192}
    settings = {role: engine | {"concurrency": SLOTS} for role in ("large", "small")}
    recipe = load_recipe(None, [f"engines={json.dumps(settings)}"])
    job = Job("regenerate", recipe, folder, folder / "regenerate", {"diversify": folder / "diversify"})
    pipeline.job_key(job)
    with job.engine("large"):  # imports torch and the tokenizer's library
        pass
    return lambda: pipeline.run_stage(job)


def prompt(number: int) -> list[dict[str, str]]:
    """A prompt that is another for each number."""
    return [{"role": "user", "content": f"{number} " + "some words of a prompt " * (WORDS // 5)}]


def write_rows(folder: Path, rows: int) -> None:
    """A table of rows as diversify leaves them, every prompt another."""
    folder.mkdir(parents=True)
    prompts = [prompt(n) for n in range(rows)]
    columns = {"id": [f"{n:032x}" for n in range(rows)], "source": ["bench"] * rows, "source_row": list(range(rows))}
    columns |= {"language": ["en"] * rows, "source_category": [None] * rows, "prompt": prompts, "reply": ["x"] * rows}
    pq.write_table(pa.table(columns, schema=RECORD_SCHEMA), folder / "part-00000.parquet")


def cpu_seconds() -> float:
    """CPU time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
