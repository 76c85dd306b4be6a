"""The engine on a server program that is not ours: `transformers serve`, started here on 127.0.0.1."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from slmfast.engines import open_engine
from slmfast.errors import UserError
from slmfast.job import BUILTIN_MODELS

NEEDS = ("fastapi", "uvicorn", "openai")  # what transformers[serving] adds
MODEL = str(BUILTIN_MODELS / "large")
PROMPTS = ["What is 3 + 4?", "3加4等于多少？", "Is 9 larger than 7?", "Next number: 5, 10, 15"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    lacking = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"transformers serve needs {', '.join(lacking)}: pip install slmfast[dev]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    (folder / "hub").mkdir()  # the list of models is that of this cache, which must be there
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    options = ["serve", MODEL, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *options], stdout=log, stderr=log, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def wait_for(url, process, log):
    for _ in range(1200):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail(f"transformers serve did not come up: {log.read_text()}")


def test_replies_are_those_of_the_local_engine(url, engine_of):
    engine, local = engine_of(url, model=MODEL), open_engine("local", MODEL, threads=1)
    assert engine.window == local.window
    ours = engine.generate(PROMPTS, max_new_tokens=24)
    theirs = local.generate(PROMPTS, max_new_tokens=24)
    assert [reply.text for reply in ours] == [reply.text for reply in theirs]
    assert [reply.finish_reason for reply in ours] == ["stop"] * 4
    assert [reply.finish_reason for reply in engine.generate(PROMPTS, max_new_tokens=1)] == ["length"] * 4
    sampled = engine.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=5)
    assert len({reply.seed for reply in sampled}) == 4
    assert engine.notes()["prompt_tokens"] == sum(engine.count_tokens(PROMPTS)) * 3
    assert engine.notes()["failed_tries"] == {}


def test_it_gives_no_scores_which_is_one_line(url, engine_of):
    with pytest.raises(UserError, match=r"engines\.large: .* can't score a given text .* prompt must be a string"):
        engine_of(url, model=MODEL).choose(PROMPTS, [["yes", "no"]] * len(PROMPTS))


def test_a_model_that_it_does_not_serve_is_one_line(url, engine_of):
    with pytest.raises(UserError, match=r"it refuses all 4 first requests: HTTP 400: Server is pinned to") as caught:
        engine_of(url, model="other").generate(PROMPTS, max_new_tokens=4)
    assert "\n" not in str(caught.value)
