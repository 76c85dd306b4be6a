"""The kernels' eager twins against the plainest formula in float64, and the Triton kernels against the twins.

Triton reads TRITON_INTERPRET when a kernel is decorated, so interpreting and compiling have a process each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slmfast.kernels import reference


def plain(hidden, weight, targets):
    logits = hidden.double() @ weight.double().T
    return logits.log_softmax(1)[torch.arange(len(targets)), targets]


@pytest.mark.parametrize(("n", "h", "v"), [(1, 8, 2), (7, 33, 773), (1500, 24, 5001), (5, 16, 4096), (3, 16, 12_289)])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_equals_the_plain_formula(n, h, v, scale):
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * scale / h**0.5
    targets = torch.randint(v, (n,))
    targets[-1] = v - 1
    got = reference.linear_logprob(hidden, weight, targets)
    assert got.dtype == torch.float32
    # the spacing of fp32 at the logits' own size is all that a product in fp32 can promise
    tolerance = 1e-6 * max(1.0, (hidden @ weight.T).abs().max().item())
    torch.testing.assert_close(got.double(), plain(hidden, weight, targets), atol=tolerance, rtol=1e-6)


def test_low_precision_is_computed_in_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(900, 64).bfloat16()
    targets = torch.randint(900, (50,))
    got = reference.linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(got.double(), plain(hidden, weight, targets), atol=1e-4, rtol=0)


def test_probabilities_over_the_vocabulary_sum_to_one():
    torch.manual_seed(1)
    hidden, weight = torch.randn(1, 20).expand(4500, 20), torch.randn(4500, 20)
    assert reference.linear_logprob(hidden, weight, torch.arange(4500)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_nan_is_not_hidden():
    hidden, weight = torch.randn(3, 8), torch.randn(100, 8)
    hidden[1, 2] = torch.nan
    got = reference.linear_logprob(hidden, weight, torch.tensor([1, 2, 3]))
    assert got.isnan().tolist() == [False, True, False]


def test_no_positions_give_nothing():
    assert reference.linear_logprob(torch.empty(0, 8), torch.randn(5, 8), torch.empty(0, dtype=torch.int64)).shape == (
        0,
    )


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        ((3, 8), (5, 9), [0, 1, 2], "don't fit"),
        ((3, 8), (5, 8), [0, 1], "don't fit"),
        ((3, 8), (5, 8), [0, 1, 5], "from 0 to 5"),
        ((3, 8), (5, 8), [0, -100, 4], "from -100 to 4"),
    ],
)
def test_what_does_not_fit_is_named(hidden, weight, targets, message):
    with pytest.raises(ValueError, match=message):
        reference.linear_logprob(torch.randn(hidden), torch.randn(weight), torch.tensor(targets))


def test_memory_stays_far_under_full_logits():
    """Peak of a child process while the head of 2,000 positions and 60,000 words runs: logits would be 458 MiB."""
    child = """
import resource, torch
from slmfast.kernels import reference
hidden, weight, targets = torch.randn(2000, 16), torch.randn(60_000, 16), torch.randint(60_000, (2000,))
reference.linear_logprob(hidden[:8], weight[:64], targets[:8] % 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reference.linear_logprob(hidden, weight, targets)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1 * 458


def child(script, **environment):
    """The JSON that a script of this folder prints last."""
    command = [sys.executable, str(Path(__file__).parent / script)]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_equals_the_twin_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton on this platform")
    errors = child("interpreted_kernels.py", TRITON_INTERPRET="1")
    assert len(errors) == 32
    assert {case: error for case, error in errors.items() if error > 1} == {}


@pytest.mark.slow
def test_triton_fits_the_3090():
    """Design: at most 99 KB of shared memory, no spills, and tensor cores wherever they can serve."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    rows = child("compiled_kernels.py")
    assert len(rows) == 4
    for row in rows:
        assert row["shared"] <= 99 * 1024 and row["spills"] == 0, row
        assert (row["mma"] > 0) == (row["dtype"] == "bf16"), row


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_equals_the_twin_on_the_device(dtype):
    from slmfast.kernels import linear_logprob as fused

    torch.manual_seed(0)
    hidden = torch.randn(300, 896, device="cuda", dtype=dtype)
    weight = (torch.randn(151_936, 896, device="cuda") / 30).to(dtype)
    targets = torch.randint(151_936, (300,), device="cuda")
    expected = reference.linear_logprob(hidden.cpu(), weight.cpu(), targets.cpu())
    got = fused.linear_logprob(hidden, weight, targets).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_the_kernel_names_what_it_cannot_take():
    fused = pytest.importorskip("slmfast.kernels.linear_logprob", reason="no Triton on this platform")
    hidden, weight, targets = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="don't fit"):
        fused.linear_logprob(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        fused.linear_logprob(hidden, weight.half(), targets)
    with pytest.raises(ValueError, match="runs on CUDA"):
        fused.linear_logprob(hidden, weight, targets)
