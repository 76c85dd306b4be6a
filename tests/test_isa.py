"""The same bytes from the whole near-duplicate room on 1, 2 and 7 threads and on each instruction set.

Each instruction set runs in a process of its own, forced through SLMFAST_ISA as a user would force it. The same program
runs on emulated older processors in test_packaging.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slmfast import _native

PROGRAM = Path(__file__).parent / "near_duplicate_digests.py"
SOURCES = Path(__file__).parents[1] / "csrc"


def told(isa: str) -> dict:
    """What the program prints with that instruction set forced."""
    command = [sys.executable, PROGRAM, "800", "1", "2", "7"]
    environment = os.environ | {"SLMFAST_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def scalar() -> dict:
    return told("scalar")


def test_the_inputs_put_something_to_the_test(scalar):
    digests = scalar["digests"]["1"]
    assert scalar["isa"] == "scalar" and scalar["pairs"] > 10_000
    assert len(digests) == len(set(digests.values())) == 4 + 9 + 10 + 4  # simhash, near_pairs, dedup, DedupIndex


@pytest.mark.parametrize("isa", _native.available_isas())
def test_same_bytes_on_every_instruction_set_and_number_of_threads(isa, scalar):
    found = scalar if isa == "scalar" else told(isa)
    assert found["isa"] == isa
    assert all(found["digests"][threads] == scalar["digests"]["1"] for threads in ("1", "2", "7"))


def test_the_cpu_is_asked_for_everything_that_functions_are_compiled_for():
    """No CPU here lacks only gfni or bitalg, so what the dispatch asks is compared with what the sources say."""
    dispatch = (SOURCES / "isa.hpp").read_text().partition("bool isa_available(Isa isa)")[2]
    asked = (re.findall(r'__builtin_cpu_supports\("(\w+)"\)', part) for part in dispatch.split("case Isa::avx2:"))
    for_avx512, for_avx2 = map(set, asked)
    targets = [
        {feature for feature in target.split(",") if not feature.startswith("prefer-")}
        for path in [*SOURCES.glob("*.hpp"), *SOURCES.glob("*.cpp")]
        for target in re.findall(r'target\("([^"]+)"\)', path.read_text())
    ]
    assert {"avx2"} in targets and any("gfni" in target for target in targets)
    for target in targets:
        wide = any(feature.startswith("avx512") for feature in target)
        assert target <= (for_avx2 | for_avx512 if wide else for_avx2), target
