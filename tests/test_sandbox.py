"""Untrusted programs: honest ones pass, hostile ones are contained and fail, as root and as another user."""

import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from slmfast import sandbox
from slmfast.cli import main
from slmfast.doctor import findings
from slmfast.errors import UserError
from slmfast.humaneval import check_completion
from slmfast.recipe import Evaluate
from slmfast.sandbox import Outcome, run_program
from slmfast.sandbox_guest import decode, encode

sys.path.insert(0, str(Path(__file__).parent))

import hostile_programs

NO_SANDBOX = sandbox.why_no_sandbox()
needs_sandbox = pytest.mark.skipif(NO_SANDBOX is not None, reason=f"no sandbox here: {NO_SANDBOX}")
PACKAGE = Path(sandbox.__file__).parent
OTHER_PYTHON = "/usr/bin/python3"
NOBODY = 65534
SECRET = "SLMFAST_SECRET"
SYSTEM_CALLS = {"x86_64": {"SOCKET_CALL": 41, "CLONE_CALL": 56}, "aarch64": {"SOCKET_CALL": 198, "CLONE_CALL": 220}}


class Listener:
    """A server on 127.0.0.1 that counts who comes."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # it was closed
            self.visits += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture(scope="module")
def public_folder() -> Iterator[Path]:
    """A folder that every user of the machine may write to, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["this user", "another user"])
def attacked(request, listener, public_folder) -> tuple[dict[str, tuple[bool, str]], Path, Listener]:
    """What came of all programs, the file that they were after, and the listener."""
    target = public_folder / f"{request.param}.txt"
    target.write_text("unharmed")
    target.chmod(0o666)
    facts = {"PORT": listener.port, "TARGET": str(target), "PARENT": os.getpid(), "PREFIX": sys.base_prefix}
    facts |= SYSTEM_CALLS[platform.machine()]
    return _attacked(request.param, facts, public_folder), target, listener


def _attacked(who: str, facts: dict, folder: Path) -> dict[str, tuple[bool, str]]:
    if NO_SANDBOX is not None:
        pytest.skip(f"no sandbox here: {NO_SANDBOX}")
    if who == "this user":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SECRET, "1")
            return hostile_programs.outcomes(facts)
    if os.geteuid() != 0 or not Path(OTHER_PYTHON).exists():
        pytest.skip("only root can be another user, and only with a system's Python, which others can read")
    copy = folder / "slmfast"
    copy.mkdir()
    for name in ("errors.py", "sandbox.py", "sandbox_guest.py", "sandbox_filter.py"):
        shutil.copy(PACKAGE / name, copy)
    script = shutil.copy(hostile_programs.__file__, folder)
    done = subprocess.run(
        [OTHER_PYTHON, script, json.dumps(facts)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), SECRET: "1"},
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    if "user namespaces" in done.stderr:
        pytest.skip(f"another user can't have a sandbox here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", hostile_programs.NAMES)
def test_a_hostile_program_fails(attacked, name):
    passed, reason = attacked[0][name]
    assert not passed and reason


def test_hostile_programs_leave_nothing_behind(attacked):
    outcomes, target, listener = attacked
    assert tuple(outcomes["honest"]) == (True, "all tests passed")
    assert target.read_text() == "unharmed"
    assert listener.visits == 0
    assert socket.create_connection(("127.0.0.1", listener.port), timeout=5)  # it does listen
    deadline = time.monotonic() + 10
    while not listener.visits and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listener.visits == 1
    listener.visits = 0


def test_attacks_say_why_they_failed(attacked):
    reasons = {name: reason for name, (_, reason) in attacked[0].items()}
    for name in ("endless loop", "endless sleep", "endless loop that ignores signals"):
        assert reasons[name] == "it took longer than 1.5 seconds"
    assert reasons["read the environment"].startswith("KeyError")
    assert reasons["memory bomb"].startswith("MemoryError")
    assert reasons["fork bomb"].startswith("BlockingIOError")
    assert reasons["exit at once"] == "it ended without an answer (exit code 0)"
    assert reasons["crash"] == "it ended without an answer (killed by SIGSEGV)"
    assert reasons["an object of its own"] == "TypeError: a value of type Yes, which is no plain data"


@needs_sandbox
def test_the_walls_stand_without_the_filter(listener, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "seccomp_filter", lambda: struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    facts = {"PORT": listener.port, "TARGET": str(tmp_path / "x"), "PARENT": os.getpid(), "PREFIX": sys.base_prefix}
    sources = hostile_programs.programs(facts | SYSTEM_CALLS[platform.machine()])
    for name in ("connect to a listener", "connect by a bare system call", "kill the tests", "be root"):
        assert not run_program(sources[name], tests="assert add(2, 3) == 5", entry_point="add").passed, name
    assert listener.visits == 0
    opened = run_program(sources["open a listener"], tests="assert add(2, 3) == 5", entry_point="add")
    assert opened.passed  # the filter is off indeed; nobody but the program itself reaches that listener


@needs_sandbox
def test_nothing_outlives_a_program_that_may_start_others():
    mark = f"slmfast-daemon-{os.getpid()}"
    source = f"""
import os, subprocess, sys, time
def add(a, b):
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.execl({os.path.realpath(sys._base_executable)!r}, {mark!r}, "-S", "-c", "import time; time.sleep(1000)")
    os.waitpid(child, 0)
    time.sleep(0.3)
    return a + b
"""
    outcome = run_program(source, tests="assert add(2, 3) == 5", entry_point="add", processes=4)
    assert outcome.passed, outcome.reason
    deadline = time.monotonic() + 10
    while _running(mark) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _running(mark)


def _running(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        if command.startswith(mark.encode()):
            found.append(path.parent.name)
    return found


@needs_sandbox
def test_a_fork_bomb_that_may_start_a_few_stays_small():
    source = """
import os, time
def add(a, b):
    started = 0
    try:
        while True:
            if os.fork() == 0:
                time.sleep(1000)
            started += 1
    except BlockingIOError:
        return started
"""
    assert run_program(source, tests="assert add(2, 3) == 5", entry_point="add", processes=6) == Outcome(
        True, "all tests passed"
    )


@needs_sandbox
def test_what_honest_programs_need():
    source = """
import asyncio, collections, dataclasses, heapq, itertools, math, random, re, string, tempfile, typing
from decimal import Decimal
@dataclasses.dataclass
class Pair:
    first: "int"
    second: "typing.List[int]"
def work(kind, value=None):
    print("x" * 100000)
    if kind == "file":
        with tempfile.TemporaryFile() as file:
            file.write(b"abc")
            file.seek(0)
            return file.read()
    if kind == "async":
        return asyncio.run(asyncio.sleep(0, 7))
    if kind == "raise":
        raise ValueError("no")
    if kind == "custom":
        raise re.error("odd")
    return {"same": value, "counter": collections.Counter("aab"), "range": range(3), "set": {1, (2, 3)},
            "map": map(str, [1]), "big": 10 ** 6000, "nan": float("nan"), "pair": Pair(1, [2]).second}[kind]
"""
    tests = """
assert work("file") == b"abc" and work("async") == 7
assert work("same", value=[1, (2.5, None), {"a": {3}}, "\\ud800"]) == [1, (2.5, None), {"a": {3}}, "\\ud800"]
assert work("counter") == {"a": 2, "b": 1} and work("set") == {1, (2, 3)} and work("pair") == [2]
assert work("range") != [0, 1, 2] and tuple(work("range")) == (0, 1, 2) and list(work("map")) == ["1"]
assert work("big") == 10 ** 6000 and str(work("nan")) == "nan"
for kind, expected in ("raise", ValueError), ("custom", RuntimeError), ("none", KeyError):
    try:
        work(kind)
    except expected as error:
        assert expected is not ValueError or str(error) == "no"
    else:
        raise AssertionError(kind)
assert helper() == 3
"""
    outcome = run_program(source, tests=tests, entry_point="work", preamble="def helper(): return 3")
    assert outcome == Outcome(True, "all tests passed")


def test_values_come_through_as_they_are():
    values = [None, True, 0, -(2**200), 1.5, "é", b"\x00", 1j, [1, [2]], (1,), {1: (2,)}, {3, 4}, frozenset({5})]
    values += [Decimal("1.10"), Fraction(1, 3), -0.0, float("inf")]
    for value in values:
        came = decode(json.loads(json.dumps(encode(value))))
        assert came == value and type(came) is type(value) and repr(came) == repr(value)
    with pytest.raises(TypeError, match="a value of type function, which is no plain data"):
        encode(test_values_come_through_as_they_are)


@needs_sandbox
def test_tests_that_break_are_no_pass():
    for tests in ("raise SystemExit", "import os\nos._exit(0)", "assert f() ==", "while True: pass"):
        assert not run_program("def f(): return 1", tests=tests, entry_point="f", seconds=1).passed


def _problems(real_data: Path) -> list[dict[str, str]]:
    lines = (real_data / "humaneval" / "HumanEval.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@needs_sandbox
def test_all_canonical_solutions_of_humaneval_pass(real_data):
    problems = _problems(real_data)
    assert len(problems) == 164
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = list(pool.map(lambda problem: check_completion(problem, problem["canonical_solution"]), problems))
    failed = {p["task_id"]: o.reason for p, o in zip(problems, outcomes, strict=True) if not o.passed}
    assert failed == {}


@needs_sandbox
def test_wrong_completions_of_humaneval_fail(real_data):
    for problem in _problems(real_data)[::20]:
        for completion in ("", "    return None\n", "    raise SystemExit\n", problem["canonical_solution"] + "\n(("):
            assert not check_completion(problem, completion).passed, problem["task_id"]


def test_generated_code_runs_only_if_asked_for(capsys, tmp_path):
    with pytest.raises(UserError, match=r"evaluate\.run_generated_code: humaneval runs programs that the model writes"):
        Evaluate(tasks=["mmlu", "humaneval"])
    assert Evaluate(tasks=["humaneval"], run_generated_code=True).tasks == ["humaneval"]
    assert not Evaluate().run_generated_code
    code = main(["evaluate", str(tmp_path), "--tasks", "humaneval", "-o", str(tmp_path / "scores.json")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and "\n" not in said and "--run-generated-code" in said


def test_without_bubblewrap_nothing_is_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.why_no_sandbox.cache_clear()
    try:
        with pytest.raises(UserError, match=r"bwrap is missing, install bubblewrap \(on Debian: apt-get install"):
            run_program("def f(): return 1", tests="f()", entry_point="f")
        assert dict(findings())["sandbox"].startswith("none, so HumanEval is refused: bwrap is missing")
        arguments = ["evaluate", "m", "--tasks", "humaneval", "--run-generated-code", "-o", str(tmp_path / "x.json")]
        assert main(arguments) == 2 and "install bubblewrap" in capsys.readouterr().err
    finally:
        sandbox.why_no_sandbox.cache_clear()


def test_a_bubblewrap_that_fails_is_named(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    sandbox.why_no_sandbox.cache_clear()
    try:
        with pytest.raises(UserError, match="bwrap failed: bwrap: No permissions to create new namespace; allow"):
            sandbox.check_sandbox()
    finally:
        sandbox.why_no_sandbox.cache_clear()
