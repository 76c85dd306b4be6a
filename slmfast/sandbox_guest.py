"""What runs inside the sandbox, on the standard library alone; slmfast.sandbox starts it, twice for every program.

One guest holds the program, the other its tests; they share no memory, no file and no process number, only two pipes.
A call of the tested function goes to the program as a line of JSON and its result comes back as one. So the program
never meets what judges it: whatever it patches, catches or fakes, all that it can do is to answer.
"""

import builtins
import itertools
import json
import os
import resource
import sys
import types
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

JOB = "/job.json"
LINE_LIMIT = 16 << 20  # bytes of one call or answer
ITEM_LIMIT = 1_000_000  # that an iterator may yield
UNANSWERED = "it ended without an answer"
REASON_LIMIT = 200  # characters of an exception that are told

_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "iterator": iter}
_LAZY = (range, type({}.keys()), type({}.values()), type({}.items()))


def encode(value: Any) -> Any:
    """Plain data as JSON can say it: scalars as they are, everything else as [kind, content].

    A subclass counts as what it derives from, so an object with an equality of its own doesn't get through with it.
    Iterators, ranges and a dictionary's views are read out.
    """
    if value is None or isinstance(value, bool | str):
        return value if value is None or type(value) is bool else str.__str__(value)
    for scalar in (int, float):
        if isinstance(value, scalar):
            return scalar(value)
    for kind, convert in (("bytes", bytes.hex), ("Decimal", str), ("Fraction", str)):
        if isinstance(value, {"bytes": bytes, "Decimal": Decimal, "Fraction": Fraction}[kind]):
            return [kind, convert(value)]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    for kind in ("list", "tuple", "set", "frozenset"):
        if isinstance(value, _SEQUENCES[kind]):
            return [kind, [encode(item) for item in value]]
    if isinstance(value, _LAZY) or hasattr(value, "__next__"):
        items = list(itertools.islice(value, ITEM_LIMIT + 1))
        if len(items) > ITEM_LIMIT:
            raise TypeError(f"an iterator of more than {ITEM_LIMIT} items")
        return ["iterator", [encode(item) for item in items]]
    raise TypeError(f"a value of type {type(value).__name__}, which is no plain data")


def decode(value: Any) -> Any:
    """The value that `encode` made this of; trusts nothing that came over the pipe."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([decode(item) for item in content])
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "complex":
        return complex(*content)
    return {"bytes": bytes.fromhex, "Decimal": Decimal, "Fraction": Fraction}[kind](content)


class Unanswered(BaseException):
    """The program gave no usable answer; tests that catch exceptions do not catch this one."""


class Channel:
    """Lines of JSON to and from the other guest. What is printed from now on goes nowhere."""

    def __init__(self) -> None:
        self._incoming = os.fdopen(os.dup(0), "rb")
        self._outgoing = os.fdopen(os.dup(1), "wb")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)

    def send(self, value: Any) -> None:
        """Writes one line."""
        line = json.dumps(value).encode() + b"\n"
        if len(line) > LINE_LIMIT:
            raise TypeError(f"a value of more than {LINE_LIMIT >> 20} MiB")
        self._outgoing.write(line)
        self._outgoing.flush()

    def receive(self) -> Any:
        """Reads one line.

        Raises:
            EOFError: the other side has ended, or its line is too long.
        """
        line = self._incoming.readline(LINE_LIMIT)
        if not line.endswith(b"\n"):
            raise EOFError("no whole line")
        return json.loads(line)


def confine(uid: int | None, gid: int | None, limits: dict[str, int]) -> None:
    """Gives up root for good, where this is root, and lowers the limits of this process and all that it starts."""
    if uid is not None and gid is not None:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    if 0 in os.getresuid() or 0 in os.getresgid():
        raise PermissionError("still root")
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def run_program(channel: Channel, source: str, entry_point: str) -> None:
    """Runs the untrusted source and answers calls of its function until there are no more."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    channel.send("ready")
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        function = getattr(module, entry_point)
    except BaseException as error:
        channel.send(["failed", _told(error)])
        return
    channel.send("defined")
    while True:
        try:
            arguments, named = channel.receive()
        except EOFError:
            return  # the tests are over
        try:
            answer = ["value", encode(function(*decode(arguments), **decode(named)))]
        except BaseException as error:
            answer = ["raised", type(error).__name__, str(error)[:REASON_LIMIT]]
        channel.send(answer)


def run_tests(channel: Channel, source: str, preamble: str, entry_point: str, verdict: int) -> None:
    """Runs the tests against the program's function and writes the verdict: lines of JSON to a pipe of our own."""

    def tell(line: dict[str, Any]) -> None:
        os.write(verdict, json.dumps(line).encode() + b"\n")

    def receive() -> Any:
        try:
            return channel.receive()
        except Exception as error:
            raise Unanswered(UNANSWERED if isinstance(error, EOFError) else _told(error)) from error

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            channel.send([encode(arguments), encode(named)])
        except BrokenPipeError as error:
            raise Unanswered(UNANSWERED) from error
        try:
            match receive():
                case ["value", value]:
                    return decode(value)
                case ["raised", str(name), str(told)]:
                    pass
                case _:
                    raise ValueError("no answer of the agreed form")
        except Exception as error:
            raise Unanswered(f"its answer can't be read: {_told(error)}") from error
        raise _same_exception(name, told)

    if channel.receive() != "ready":
        return  # it never started: without a line from here, that is an error and no verdict
    tell({"ready": True})
    try:
        state = receive()
        if state != "defined":
            raise Unanswered(str(state[1]) if isinstance(state, list) and len(state) == 2 else "no usable answer")
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(preamble, "preamble.py", "exec"), space)
        space[entry_point] = call
        exec(compile(source, "tests.py", "exec"), space)
    except BaseException as error:
        reason = str(error) if isinstance(error, Unanswered) else _told(error)
        tell({"passed": False, "reason": reason[:REASON_LIMIT]})
        return
    tell({"passed": True, "reason": "all tests passed"})


def _same_exception(name: str, told: str) -> Exception:
    """An exception of that name, which a test may expect, if it is one of Python's own."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError | ExceptionGroup):
        return kind(told)
    return RuntimeError(f"{name}: {told}")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")[:REASON_LIMIT]


def main() -> None:
    """Runs the job that lies in the sandbox."""
    job = json.loads(Path(JOB).read_text(encoding="utf-8"))
    sys.set_int_max_str_digits(0)  # a long answer is no attack here: lines are limited
    verdict = os.dup(2)
    confine(job["uid"], job["gid"], job["limits"])
    channel = Channel()
    if job["tests"] is None:
        os.close(verdict)
        run_program(channel, job["source"], job["entry_point"])
    else:
        run_tests(channel, job["tests"], job["preamble"], job["entry_point"], verdict)


if __name__ == "__main__":
    main()
