"""Servers for the tests, each a program of its own."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from slmfast.engines import open_engine
from slmfast.engines.settings import EngineSettings
from slmfast.job import BUILTIN_MODELS

PROGRAM = Path(__file__).parent / "openai_server.py"


class Served:
    """A running server."""

    def __init__(self, **options):
        command = [sys.executable, str(PROGRAM), json.dumps(options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stats(self):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats") as answer:
            return json.load(answer)

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def serve():
    """A function that starts a server with the options of openai_server.py."""
    running = []

    def start(**options):
        running.append(Served(**options))
        return running[-1]

    yield start
    for server in running:
        server.end()


@pytest.fixture
def engine_of(tmp_path):
    """A function that opens an engine on a server, with the miniature's tokenizer."""
    opened = []

    def open_one(server, store="replies.sqlite", **settings):
        settings = {"tries": 12, "backoff": 0.01, "timeout": 20.0} | settings
        url = server if isinstance(server, str) else server.url
        given = EngineSettings(kind="openai", base_url=url, **({"model": "served"} | settings))
        folder = BUILTIN_MODELS / "large"
        engine = open_engine(given, folder, store=tmp_path / store, role="large", key="engines.large")
        opened.append(engine)
        return engine

    yield open_one
    for engine in opened:
        engine.close()
