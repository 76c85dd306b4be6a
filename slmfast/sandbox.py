"""Runs programs that a model wrote where they can do no harm: HumanEval scores a model by running its code.

Bubblewrap gives the program namespaces of its own: no network, no process but its own, of files the interpreter and
the system's libraries alone, read-only, and an empty temporary folder in memory. Its environment is empty, it has an
unprivileged user id, and its time, memory, files and processes are limited. As root, the limit on processes would do
nothing and so root is given up for an id that nobody has; as another user, a user namespace does it. A seccomp filter
closes what these leave open (`sandbox_filter`). Where any of this can't be had, nothing is run.

The tests run in a second sandbox (`sandbox_guest`), so success is not something that a program could say of itself:
it only answers calls with plain data. What it can still do is to answer the very calls of the tests from a table, and
to make as many empty files as its time allows: the temporary folder's size bounds bytes, not names.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from slmfast.errors import UserError
from slmfast.sandbox_filter import seccomp_filter, supported
from slmfast.sandbox_guest import UNANSWERED

GUEST = Path(__file__).parent / "sandbox_guest.py"
START_SECONDS = 60.0  # until the interpreters run: no part of the program's own time
TEMPORARY_BYTES = 64 << 20  # of the temporary folder
OPEN_FILES = 64
LINES_LIMIT = 1 << 16  # bytes of a verdict
NOBODY = 65534
SYSTEM_FOLDERS = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64")


class Outcome(NamedTuple):
    """Whether a program passed its tests, and the reason in one line."""

    passed: bool
    reason: str


def run_program(
    source: str,
    *,
    tests: str,
    entry_point: str,
    preamble: str = "",
    seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
    processes: int = 1,
) -> Outcome:
    """Runs an untrusted Python program in a sandbox and its tests in another one.

    Args:
        source: the program; it defines a function called `entry_point`.
        tests: Python source that calls `entry_point` and raises where a result is wrong. Arguments and results are
            plain data: None, numbers, strings, bytes, and lists, tuples, sets and dictionaries of them.
        preamble: source of definitions that the tests need beside the function, run before them.
        seconds: for the program and its tests together, by the clock; each may use as much of a processor.
        memory_bytes: of address space for each process; files in the temporary folder may take 64 MiB more.
        processes: how many the program may be, threads included; 1 means that it can start none.

    Returns:
        Passed, only if the tests ran to their end.

    Raises:
        UserError: there is no sandbox on this machine (`check_sandbox`), or it did not start.
    """
    check_sandbox()
    job = {"source": source, "tests": tests, "preamble": preamble, "entry_point": entry_point}
    return _run(job, seconds, memory_bytes, processes)


def check_sandbox() -> None:
    """Raises UserError, with what mends it, where this machine can't run a program in a sandbox."""
    why = why_no_sandbox()
    if why is not None:
        raise UserError(f"programs that a model wrote run in a sandbox only, and there is none: {why}")


@functools.cache
def why_no_sandbox() -> str | None:
    """Why this machine has no sandbox, and what mends that; None where a first small program passed in it."""
    if not sys.platform.startswith("linux") or not supported():
        return "it takes Linux on x86-64 or ARM64"
    if shutil.which("bwrap") is None:
        return "bwrap is missing, install bubblewrap (on Debian: apt-get install bubblewrap)"
    job = {"source": "def f(): return 1", "tests": "assert f() == 1", "preamble": "", "entry_point": "f"}
    try:
        outcome = _run(job, 10.0, 1 << 30, 1)
    except UserError as error:
        remedy = "allow it SYS_ADMIN in this container" if os.geteuid() == 0 else "allow user namespaces, or be root"
        return f"{error}; {remedy}"
    return None if outcome.passed else f"a first small program failed in it ({outcome.reason})"


def _run(job: dict[str, str], seconds: float, memory_bytes: int, processes: int) -> Outcome:
    limits = {
        "RLIMIT_CPU": math.ceil(seconds) + 1,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_NPROC": processes if os.geteuid() == 0 else processes + 1,  # in a user namespace bwrap counts too
        "RLIMIT_FSIZE": TEMPORARY_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
    }
    with contextlib.ExitStack() as stack:
        calls, answers = os.pipe(), os.pipe()
        try:
            program = stack.enter_context(_sandbox(job | {"tests": None}, limits, calls[0], answers[1]))
            tests = stack.enter_context(_sandbox(job, limits, answers[0], calls[1]))
        finally:
            for end in (*calls, *answers):
                os.close(end)  # a side that ends is then seen by the other
        lines = _Lines(tests)
        try:
            if lines.next(START_SECONDS) is None:
                raise UserError(f"bwrap failed: {_complaint(program) or _complaint(tests) or 'it gave no reason'}")
        except TimeoutError as error:
            raise UserError(f"bwrap did not start within {START_SECONDS:g} seconds: is the machine busy?") from error
        try:
            verdict = lines.next(seconds)
        except TimeoutError:
            return Outcome(False, f"it took longer than {seconds:g} seconds")
        if verdict is None:
            return Outcome(False, "its tests ended without a verdict")
        reason = str(verdict["reason"])
        return Outcome(verdict["passed"] is True, f"{reason}{_ending(program)}" if reason == UNANSWERED else reason)


def _ending(program: subprocess.Popen[bytes]) -> str:
    """How a program that gave no answer ended; bubblewrap gives a signal as 128 and its number."""
    try:
        code = program.wait(1.0)
    except subprocess.TimeoutExpired:
        return ""  # it closed the pipe and goes on
    if code <= 128:
        return f" (exit code {code})"
    return f" (killed by {signal.Signals(code - 128).name})" if code - 128 in set(signal.Signals) else ""


class _Lines:
    """The lines of JSON that the tests' guest writes to its stderr."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        self._pipe = process.stderr
        self._read = b""
        self._ready = select.poll()  # select itself takes no more than 1024 open files
        self._ready.register(self._pipe)

    def next(self, seconds: float) -> Any:
        """The next line's value, None where there is none; raises TimeoutError if it does not come in time."""
        end = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not self._ready.poll(1000 * max(0.0, end - time.monotonic())):
                raise TimeoutError
            piece = os.read(self._pipe.fileno(), LINES_LIMIT)
            if not piece or len(self._read) > LINES_LIMIT:
                return None
            self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line) if line.startswith(b"{") else None  # bwrap's own complaints come here too


def _complaint(process: subprocess.Popen[bytes]) -> str:
    """What bwrap, or the interpreter before it ran anything, said when it failed."""
    assert process.stderr is not None
    process.kill()
    said = process.stderr.read(LINES_LIMIT).decode(errors="replace").strip().splitlines()
    return said[-1][:200] if said else ""


@contextlib.contextmanager
def _sandbox(job: dict[str, Any], limits: dict[str, int], stdin: int, stdout: int) -> Iterator[subprocess.Popen[bytes]]:
    """Starts one guest, and ends it with all that it started when the block ends."""
    root = os.geteuid() == 0
    ids = {kind: _spare_id(kind) if root else None for kind in ("uid", "gid")}
    files = {
        "guest": _memory_file(GUEST.read_bytes()),
        "job": _memory_file(json.dumps(job | ids | {"limits": limits}).encode()),
        "filter": _memory_file(seccomp_filter()),
    }
    try:
        process = subprocess.Popen(
            ["bwrap", *_view(files), *_interpreter()],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=list(files.values()),
            start_new_session=True,
        )
    finally:
        for file in files.values():
            os.close(file)
    try:
        yield process
    finally:
        process.kill()  # its namespace dies with it
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def _view(files: dict[str, int]) -> list[str | Path]:
    """Bubblewrap's arguments: namespaces, and what is to be seen of the files."""
    view: list[str | Path] = [
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.geteuid() == 0:
        view += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # the guest gives them up
    else:
        view += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    view += ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    executable, prefix = _interpreter()[0], os.path.realpath(sys.base_prefix)
    binds = [*SYSTEM_FOLDERS, f"{prefix}/lib", f"{prefix}/lib64", executable, "/etc/ld.so.cache"]
    for parent in dict.fromkeys(parent for path in (*binds, "/dev/null") for parent in _parents(path)):
        view += ["--perms", "0755", "--dir", parent]  # those that bubblewrap makes by itself let no other user in
    for path in map(Path, dict.fromkeys(binds)):
        view += ["--symlink", path.readlink(), path] if path.is_symlink() else ["--ro-bind-try", path, path]
    view += ["--dev-bind", "/dev/null", "/dev/null"]
    view += ["--size", str(TEMPORARY_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    view += ["--perms", "0444", "--ro-bind-data", str(files["guest"]), "/guest.py"]
    view += ["--perms", "0444", "--ro-bind-data", str(files["job"]), "/job.json"]
    return [*view, "--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(files["filter"]), "--"]


def _parents(path: str) -> list[Path]:
    """The folders above a path, the outermost first, that are to be made for it: links to others are made as links."""
    parents = [parent for parent in reversed(Path(path).parents) if parent != Path("/")]
    return [] if any(parent.is_symlink() for parent in parents) else parents


def _interpreter() -> list[str]:
    """The interpreter outside any virtual environment, with no packages and writing no bytecode."""
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    return [executable, "-s", "-S", "-B", "/guest.py"]


def _memory_file(content: bytes) -> int:
    file = os.memfd_create("slmfast")
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(content)
    os.lseek(file, 0, os.SEEK_SET)
    return file


def _spare_id(kind: str) -> int:
    """A random user or group id of the upper half of those that this machine knows, where nobody is to be expected.

    Every sandbox has another, for the limit on processes counts all processes of a user.
    """
    ranges = [tuple(map(int, line.split())) for line in Path(f"/proc/self/{kind}_map").read_text().splitlines()]
    first, _, count = max(ranges, key=lambda fields: fields[2])
    if count < 4:
        raise UserError("root is the only user of this container: run it as another user, or with user ids mapped")
    return first + count // 2 + secrets.randbelow(count - count // 2 - 1)
