"""The fuzzer of tests/sanitize on the module as it is, and on one built with the sanitizers where gcc has them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "sanitize"


def run(program: str, *arguments: object) -> str:
    """A program of tests/sanitize in a process of its own, for a crash would end this one; returns what it prints."""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, FOLDER / program, *arguments]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=plain, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def counted(output: str, what: str) -> int:
    found = re.search(rf"^ *([\d,]+) {what}", output, re.MULTILINE)
    assert found, output
    return int(found[1].replace(",", ""))


def test_fuzzed_inputs_are_answered_right_or_refused():
    output = run("fuzz_native.py", "--inputs", 6000, "--seed", 7)
    assert counted(output, "inputs, no finding") >= 6000
    for kind in ("byte strings refused", "damaged chunks refused", "cluster calls refused", "near_pairs equal"):
        assert counted(output, kind) > 20, kind


def test_the_fuzzer_notices_a_wrong_answer(tmp_path):
    (tmp_path / "spoiled.py").write_text(
        "import runpy, sys\n"
        "from slmfast import _native\n"
        "right = _native.near_pairs\n"
        "_native.near_pairs = lambda values, k, threads: tuple(column[:-1] for column in right(values, k, threads))\n"
        f"sys.argv = ['fuzz', '--inputs', '2000']\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        f"runpy.run_path({str(FOLDER / 'fuzz_native.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "spoiled.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AssertionError" in done.stderr


@pytest.mark.slow
def test_fuzzed_inputs_under_the_sanitizers():
    missing = "import run, sys; sys.exit(run.missing())"
    done = subprocess.run([sys.executable, "-c", missing], cwd=FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    output = run("run.py", "--fuzz-only", "--inputs", 20_000)
    assert "planted faults found: use after free, wide shift" in output
    assert counted(output, "inputs, no finding") >= 20_000
