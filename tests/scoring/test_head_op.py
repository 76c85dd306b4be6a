"""The LM head as an operator: its fake twin, what it needs to be imported, and the memory that its sizes promise."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slmfast.kernels import head_op
from slmfast.kernels.launch import FusedTiles, fused_tiles, tiled_shape, transient_bytes
from slmfast.scoring.head import linear_logprob


@pytest.mark.parametrize("entropy", [False, True])
def test_it_keeps_the_rules_of_torchs_operators(entropy):
    given = (torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,)), entropy)
    assert set(torch.library.opcheck(head_op.linear_logprob, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_says_which_targets_are_the_likeliest(dtype):
    """Several tiles of positions and words; one row in three aims at its argmax."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1500, 24).to(dtype), torch.randn(5001, 24).to(dtype)
    logits = hidden.double() @ weight.double().T
    highest, largest = logits.max(1)
    targets = torch.where(torch.arange(1500) % 3 == 0, largest, torch.randint(5001, (1500,)))
    *_, greedy = head_op.linear_logprob(hidden, weight, targets, False)
    differs = greedy != (targets == largest)
    # in bf16 most logits are rounded, and two that lie that near each other can't be told apart
    near = (highest - logits[torch.arange(1500), targets]) <= highest.abs() * 2**-8
    assert torch.equal(differs, differs & near if dtype == torch.bfloat16 else torch.zeros_like(differs))
    assert differs.sum() < 15


class _Largest(TorchDispatchMode):
    """Remembers the most elements of a result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            self.elements = max(self.elements, tensor.numel())
        return result


def test_a_plan_sees_results_and_no_logits():
    """The judge's own shape: 4,096 positions of Qwen2.5-7B would be 1.2 GB of bf16 logits."""
    with FakeTensorMode():
        hidden = torch.empty(4096, 3584, dtype=torch.bfloat16)
        weight, targets = torch.empty(152_064, 3584, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.int64)
        with _Largest() as largest:
            logprob, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    for result in (logprob, entropy):
        assert (result.shape, result.dtype) == ((4096,), torch.float32)
    assert largest.elements == 4096


def test_a_model_in_training_gets_no_graph():
    weight = torch.nn.Parameter(torch.randn(11, 8))
    assert not linear_logprob(torch.randn(5, 8), weight, torch.randint(11, (5,))).requires_grad


def test_it_works_without_triton_and_the_package_without_torch():
    child = """
import sys
sys.modules["triton"] = None
import slmfast
assert "torch" not in sys.modules
import torch
from slmfast.scoring.head import linear_logprob
print(float(linear_logprob(torch.zeros(1, 4), torch.ones(8, 4), torch.tensor([3])).exp()))
"""
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(1 / 8)


@pytest.mark.parametrize("count", [1, 37, 4096, 10_000])
def test_cuda_holds_a_tenth_of_trls_tile(count):
    """TRL's chunked head holds min(N, 4096) x 32768 logits in bf16. Few positions need little in any case."""
    assert transient_bytes(count, 151_936) <= max(0.1 * 4096 * 32768 * 2, 0.01 * count * 151_936 * 4)


@pytest.mark.parametrize("size", [1, 4 << 20, 24 << 20])
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (3, 151_936), (4096, 151_936), (9000, 500)])
def test_a_tile_keeps_its_size_and_covers_something(size, count, vocabulary):
    rows, columns = tiled_shape(count, vocabulary, size)
    assert 1 <= rows <= count and 1 <= columns <= vocabulary
    assert 4 * rows * columns <= max(size, 4 * 128 * rows)


def test_tiles_of_a_device():
    """Hopper's large tiles are for Hopper and even widths alone; what is not known takes those of sm_86."""
    assert fused_tiles((8, 6), 2, 896) == fused_tiles((12, 0), 2, 896) == fused_tiles((9, 0), 2, 912)
    assert fused_tiles((8, 6), 2, 900) == fused_tiles((9, 0), 2, 900) != fused_tiles((8, 6), 2, 896)
    assert set(fused_tiles((8, 6), 2, 896)) < set(fused_tiles((9, 0), 2, 896))
    with pytest.raises(ValueError, match="no multiple of block_v"):
        FusedTiles(block_n=64, block_v=96, block_h=32, warps=4, stages=2)
