"""The 3090 gate: it passes on what ships, and fails on each thing that it is there to find."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
BENCH = Path(__file__).resolve().parents[1] / "bench"
TARGETS = ("sm_86", "sm_90")
LISTING = """
        .section .text._kernel
_kernel:
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1+0x4], R7 ;
.L_x_0:
        /*0020*/                   LDG.E R2, [R4.64] ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0040*/                   LDL R7, [R1+0x4] ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   HGMMA.64x128x16.F32 R24, gdesc[UR4], R24 ;
        /*0070*/              @P1  BRA `(.L_x_0) ;
        /*0080*/                   STL.64 [R1+0x8], R10 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/                   LDL.LU R3, [R1] ;
.L_x_2:
        /*00b0*/                   EXIT ;
"""


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import sm86

    return sm86


def run(*arguments):
    """The gate in a process of its own, started as an interpreter test would start it."""
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    command = [sys.executable, str(BENCH / "sm86.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_every_kernel_that_ships_passes():
    code, lines = run()
    assert code == 0, [line for line in lines if line.startswith("FAILS")]
    rows = json.loads(lines[-1])["kernels"]
    assert {frozenset(row) for row in rows} == {
        frozenset(("name", "config", "target", "registers", "spills", "shared", "mma"))
    }
    of_target = {target: {(r["name"], r["config"]) for r in rows if r["target"] == target} for target in TARGETS}
    assert of_target["sm_86"] <= of_target["sm_90"]
    # with and without entropy: two sizes of bf16 and fp16 and one of fp32 for even and masked widths each, one size of
    # each dtype for unaligned widths, and the fold
    forward = 2 * (2 * (2 + 2 + 1) + 3 + 1)
    # the same sizes to recompute; products for three dtypes, three kinds of width, both gradients, both kinds of
    # vocabulary; the gradient of logits for three dtypes
    backward = (2 * (2 + 2 + 1) + 3) + 3 * 3 * 2 * 2 + 3
    # with and without compensation: the optimizer's step over a multiple of 16 weights and over any number
    assert len(of_target["sm_86"]) == forward + backward + 2 * 2
    for row in rows:
        # what recomputes may spill, once, outside of its loop
        assert 0 < row["registers"] <= 255 and row["spills"] <= (4 if row["name"] == "recompute_gradient" else 0)
        multiplies = row["name"] not in ("fold_logits", "gradient_of_logits")
        assert (row["mma"] > 0) == (multiplies and row["config"].startswith(("bf16", "fp16")))
        if row["target"] == "sm_86":
            assert row["shared"] <= 101_376


@pytest.mark.slow
def test_tiles_that_are_too_large_fail():
    code, lines = run("--tiles", "128", "128", "128", "8", "3")
    failures = [line for line in lines if line.startswith("FAILS")]
    assert code == 1
    assert any("sm_86: 131072 bytes of shared memory a block, the device has 101376" in line for line in failures), (
        lines
    )
    assert any("sm_86" in line and "spilled registers in a loop" in line for line in failures)
    assert not any("sm_90" in line and "shared memory" in line for line in failures)
    assert max(row["spills"] for row in json.loads(lines[-1])["kernels"]) > 0


GOOD = {"name": "k", "config": "c", "target": "sm_86", "registers": 255, "spills": 4, "shared": 101_376, "mma": 32}


@pytest.mark.parametrize(
    ("changed", "spills_in_loops", "tensor_cores", "found"),
    [
        ({}, 0, True, []),
        ({"mma": 0}, 0, False, []),
        ({"mma": 0}, 0, True, ["no tensor-core instruction"]),
        ({"shared": 101_377}, 0, True, ["101377 bytes of shared memory"]),
        ({"shared": 101_377, "target": "sm_90"}, 0, True, []),
        ({}, 1, True, ["1 loads and stores of spilled registers in a loop"]),
        ({"registers": 256}, 0, True, ["256 registers"]),
    ],
)
def test_the_rule(gate, changed, spills_in_loops, tensor_cores, found):
    faults = gate.faults(gate.Row(**GOOD | changed), spills_in_loops, tensor_cores)
    assert len(faults) == len(found)
    assert all(text in fault for text, fault in zip(found, faults, strict=True))


def test_machine_code_is_counted(gate):
    from machine_code import counted

    code = counted(LISTING, "Function _kernel:\n  REG:243 STACK:0 SHARED:0 LOCAL:0")
    assert (code.registers, code.instructions) == (243, 12)
    # the branch to .L_x_2 leads forward: what it skips is no loop
    assert (code.spills, code.spills_in_loops, code.tensor_core_instructions) == (4, 1, 2)


@pytest.mark.parametrize(("listing", "usage"), [("", "REG:3"), (LISTING, "no such thing")])
def test_a_listing_that_cannot_be_read_is_no_pass(gate, listing, usage):
    from machine_code import counted

    with pytest.raises(ValueError, match="another version"):
        counted(listing, usage)
