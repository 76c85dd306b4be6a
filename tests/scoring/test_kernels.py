"""The LM head's paths against the plainest formula in float64: the oracle, the CPU's, and the Triton kernels.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the interpreter has a process of its own.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slmfast.kernels import eager_logprob, reference

PATHS = [reference, eager_logprob]


def plain(hidden, weight, targets):
    """Log-probabilities and entropies, float64."""
    logprobs = (hidden.double() @ weight.double().T).log_softmax(1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("n", "h", "v"), [(1, 8, 2), (7, 33, 773), (1500, 24, 5001), (5, 16, 4096), (3, 16, 12_289), (4, 8, 1)]
)
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_equals_the_plain_formula(path, n, h, v, scale):
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, h), torch.randn(v, h) * scale / h**0.5
    targets = torch.randint(v, (n,))
    targets[-1] = v - 1
    got, spread = path.linear_logprob(hidden, weight, targets, entropy=True)
    assert got.dtype == spread.dtype == torch.float32
    # the spacing of fp32 at the logits' own size is all that a product in fp32 can promise
    tolerance = 1e-6 * max(1.0, (hidden @ weight.T).abs().max().item())
    expected, entropy = plain(hidden, weight, targets)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=1e-6)
    torch.testing.assert_close(spread.double(), entropy, atol=2 * tolerance, rtol=2e-6)
    assert torch.equal(path.linear_logprob(hidden, weight, targets), got)


@pytest.mark.parametrize("path", PATHS)
def test_even_odds_have_the_largest_entropy(path):
    """Equal logits of any size: every probability is 1/V and the entropy log V."""
    hidden, weight = torch.tensor([[0.0, 0.0], [1000.0, 0.0]]), torch.ones(777, 2)
    got, spread = path.linear_logprob(hidden, weight, torch.tensor([3, 776]), entropy=True)
    assert spread.tolist() == pytest.approx([math.log(777)] * 2)
    assert got.tolist() == pytest.approx([-math.log(777)] * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_oracle_computes_low_precision_in_fp32(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64).to(dtype), torch.randn(900, 64).to(dtype)
    targets = torch.randint(900, (50,))
    got = reference.linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(got.double(), plain(hidden, weight, targets)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_cpu_stays_within_the_error_of_plain_low_precision(dtype, scale):
    """Logits in the inputs' dtype and an fp32 softmax are what a plain model gives; targets likely and unlikely."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(300, 128).to(dtype), (torch.randn(5000, 128) * scale / 128**0.5).to(dtype)
    targets = torch.randint(5000, (300,))
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]
    truth = plain(hidden, weight, targets)
    logprobs = (hidden @ weight.T).float().log_softmax(1)
    usual = (logprobs[torch.arange(300), targets], -(logprobs.exp() * logprobs).sum(1))
    ours = eager_logprob.linear_logprob(hidden, weight, targets, entropy=True)
    for mine, theirs, true in zip(ours, usual, truth, strict=True):
        assert (mine - true).abs().max() <= (theirs - true).abs().max() + 1e-5
        assert (mine - true).abs().mean() <= (theirs - true).abs().mean() + 1e-5
    # the targets' own logits are exact, and so are those that weigh most beside them
    assert (ours[0] - truth[0]).abs().mean() <= (usual[0] - truth[0]).abs().mean() / 5


@pytest.mark.parametrize("path", PATHS)
def test_probabilities_over_the_vocabulary_sum_to_one(path):
    torch.manual_seed(1)
    hidden, weight = torch.randn(1, 20).expand(4500, 20), torch.randn(4500, 20)
    assert path.linear_logprob(hidden, weight, torch.arange(4500)).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_not_hidden(path, dtype):
    hidden, weight = torch.randn(3, 8, dtype=dtype), torch.randn(100, 8, dtype=dtype)
    hidden[1, 2] = torch.nan
    for got in path.linear_logprob(hidden, weight, torch.tensor([1, 2, 3]), entropy=True):
        assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("path", PATHS)
def test_no_positions_give_nothing(path):
    nothing = (torch.empty(0, 8), torch.randn(5, 8), torch.empty(0, dtype=torch.int64))
    assert path.linear_logprob(*nothing).shape == (0,)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "message"),
    [
        ((3, 8), (5, 9), [0, 1, 2], "don't fit"),
        ((3, 8), (5, 8), [0, 1], "don't fit"),
        ((3, 8), (5, 8), [0, 1, 5], "from 0 to 5"),
        ((3, 8), (5, 8), [0, -100, 4], "from -100 to 4"),
    ],
)
def test_what_does_not_fit_is_named(path, hidden, weight, targets, message):
    with pytest.raises(ValueError, match=message):
        path.linear_logprob(torch.randn(hidden), torch.randn(weight), torch.tensor(targets))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_far_under_full_logits(dtype):
    """Peak of a child process while the head of 4,000 positions and 60,000 words runs: logits would be 916 MiB."""
    child = """
import resource, torch
from slmfast.kernels import eager_logprob
dtype = torch.DTYPE
hidden, weight = torch.randn(4000, 16, dtype=dtype), torch.randn(60_000, 16, dtype=dtype)
targets = torch.randint(60_000, (4000,))
eager_logprob.linear_logprob(hidden[:8], weight[:64], targets[:8] % 64, entropy=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
eager_logprob.linear_logprob(hidden, weight, targets, entropy=True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
""".replace("DTYPE", dtype)
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1 * 916


def child(script, **environment):
    """The JSON that a script of this folder prints last."""
    command = [sys.executable, str(Path(__file__).parent / script)]
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_triton_equals_float64_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton on this platform")
    errors = child("interpreted_kernels.py", TRITON_INTERPRET="1")
    assert len(errors) == 2 * (6 * 3 * 5 + 3) + 5
    assert {case: error for case, error in errors.items() if error > 1} == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [896, 100])
def test_every_path_equals_the_oracle_on_the_device(dtype, width):
    from slmfast.kernels import linear_logprob as fused
    from slmfast.kernels import tiled_logprob as tiled
    from slmfast.kernels.launch import TILED_BYTES

    torch.manual_seed(0)
    hidden = torch.randn(300, width, device="cuda", dtype=dtype)
    weight = (torch.randn(151_936, width, device="cuda") / width**0.5).to(dtype)
    targets = torch.randint(151_936, (300,), device="cuda")
    given = (hidden, weight, targets)
    expected = reference.linear_logprob(*(x.cpu() for x in given), entropy=True)
    found = [fused.linear_logprob(*given, entropy=True, tiles=tiles) for tiles in fused.choices(hidden, weight)]
    found += [tiled.linear_logprob(*given, entropy=True, tile_bytes=size) for size in TILED_BYTES]
    for got in found:
        for mine, true in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), true, atol=1e-4, rtol=0)


def test_the_kernel_names_what_it_cannot_take():
    fused = pytest.importorskip("slmfast.kernels.linear_logprob", reason="no Triton on this platform")
    hidden, weight, targets = torch.randn(3, 8), torch.randn(5, 8), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="don't fit"):
        fused.linear_logprob(hidden, weight[:, :7], targets)
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        fused.linear_logprob(hidden, weight.half(), targets)
    with pytest.raises(ValueError, match="runs on CUDA"):
        fused.linear_logprob(hidden, weight, targets)
