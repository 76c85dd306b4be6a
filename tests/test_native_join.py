"""Corners of the native join that no call from Python reaches, in a program of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = [CSRC / f"{name}.cpp" for name in ("hamming_join", "join_plan", "probe_join")]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
def test_rows_past_two_to_the_31_and_joins_that_end_early(tmp_path):
    program = tmp_path / "native_join"
    flags = ["-std=c++17", "-O1", "-pthread", "-DSLMFAST_SMALL_JOINS", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, HERE / "native_join.cpp", *SOURCES, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
