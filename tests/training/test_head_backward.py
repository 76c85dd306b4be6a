"""The LM head's gradients against autograd through a plain log-softmax in float64, and the memory that they take.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the interpreter has a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from slmfast.kernels import head_op
from slmfast.kernels.head_op import accumulating_logprob
from slmfast.kernels.launch import MIB, backward_workspace

SHAPES = [(1, 8, 2), (7, 33, 1000), (1500, 24, 5001), (9, 16, 1537), (3, 12, 151_936), (4, 8, 1)]


def case(n, h, v, dtype=torch.float32, scale=3.0):
    torch.manual_seed(n)
    hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) * scale / h**0.5).to(dtype)
    targets = torch.randint(v, (n,))
    targets[-1] = v - 1
    return hidden, weight, targets, torch.randn(n)


def by_autograd(hidden, weight, targets, grad, dtype=torch.float64):
    """Log-probabilities and the gradients of hidden and weight; below fp32 the softmax is fp32, as models have it."""
    hidden, weight = (x.detach().clone().to(dtype).requires_grad_() for x in (hidden, weight))
    logprobs = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(1)
    logprobs = logprobs.gather(1, targets[:, None])[:, 0]
    logprobs.backward(grad.to(logprobs.dtype))
    return logprobs.detach().double(), hidden.grad.double(), weight.grad.double()


def ours(hidden, weight, targets, grad, weight_grad):
    hidden = hidden.detach().clone().requires_grad_()
    logprobs = accumulating_logprob(hidden, weight, targets, weight_grad)
    logprobs.backward(grad)
    return logprobs.detach(), hidden.grad


@pytest.fixture(params=[0, 9 * 1000 * 4, head_op.KEPT_BYTES], ids=["recomputed", "some kept", "kept"])
def kept(request, monkeypatch):
    """How many bytes of logits the forward keeps for the backward."""
    monkeypatch.setattr(head_op, "KEPT_BYTES", request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_float64(shape, kept):
    given = case(*shape)
    weight_grad = torch.zeros(given[1].shape)
    logprobs, hidden_grad = ours(*given, weight_grad)
    found, plain = (logprobs, hidden_grad, weight_grad), by_autograd(*given, torch.float32)
    for got, usual, true in zip(found, plain, by_autograd(*given), strict=True):
        assert got.dtype == torch.float32
        # 1 - p of a likely target has few bits in fp32, whoever computes it
        assert (got - true).norm() <= 1.5 * (usual - true).norm() + 2e-6 * true.norm() + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_low_precision_errs_no_more_than_a_plain_model(dtype, scale, kept):
    hidden, weight, targets, grad = case(300, 128, 5000, dtype, scale)
    targets[::2] = (hidden @ weight.T).argmax(1)[::2]  # likely and unlikely ones
    true, usual = (by_autograd(hidden, weight, targets, grad, kind)[1:] for kind in (torch.float64, dtype))
    weight_grad = torch.zeros(weight.shape)
    found = ours(hidden, weight, targets, grad, weight_grad)[1], weight_grad
    assert found[0].dtype == dtype
    for mine, theirs, exact in zip(found, usual, true, strict=True):
        # a twentieth more: what a tile adds is rounded, where a plain model rounds the whole sum alone
        assert (mine - exact).norm() <= 1.05 * (theirs - exact).norm() + 1e-5 * exact.norm()
        assert (mine - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 1e-5


def test_values_are_those_of_scoring_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, targets, _ = case(1500, 24, 5001, dtype)
        scored, *_ = head_op.linear_logprob(hidden, weight, targets, False)
        assert torch.equal(accumulating_logprob(hidden.requires_grad_(), weight, targets, None), scored)


def test_a_tied_buffer_gathers(kept):
    hidden, weight, targets, grad = case(40, 24, 1537)
    once, buffer = torch.zeros(weight.shape), torch.randn(weight.shape)
    ours(hidden, weight, targets, grad, once)
    before = buffer.clone()
    ours(hidden, weight, targets, grad, buffer)
    ours(hidden, weight, targets, grad, buffer)
    torch.testing.assert_close(buffer, before + 2 * once, atol=1e-5, rtol=0)
    assert weight.grad is None


def test_one_graph_may_run_backward_twice():
    hidden, weight, targets, grad = case(40, 24, 1537)
    hidden.requires_grad_()
    once, twice = torch.zeros(2, *weight.shape)
    ours(hidden.detach(), weight, targets, grad, once)
    logprobs = accumulating_logprob(hidden, weight, targets, twice)
    logprobs.backward(grad, retain_graph=True)
    logprobs.backward(grad)
    torch.testing.assert_close(twice, 2 * once)


def test_a_frozen_weight_changes_nothing_for_the_hidden_states():
    hidden, weight, targets, grad = case(40, 24, 1537)
    with_weight = ours(hidden, weight, targets, grad, torch.zeros(weight.shape))[1]
    assert torch.equal(ours(hidden, weight, targets, grad, None)[1], with_weight)


def test_a_frozen_model_still_trains_its_head():
    hidden, weight, targets, grad = case(40, 24, 1537)
    expected, got = torch.zeros(2, *weight.shape)
    ours(hidden, weight, targets, grad, expected)
    accumulating_logprob(hidden, weight, targets, got).backward(grad)
    assert torch.equal(got, expected) and hidden.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_positions_add_exactly_nothing(dtype, kept):
    hidden, weight, targets, grad = case(40, 24, 1537, dtype)
    grad[::3] = 0
    some, all_masked = torch.zeros(2, *weight.shape)
    hidden_grad = ours(hidden, weight, targets, grad, some)[1]
    assert not hidden_grad[::3].any()
    there = grad != 0
    without = torch.zeros(weight.shape)
    ours(hidden[there], weight, targets[there], grad[there], without)
    torch.testing.assert_close(some, without, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)
    assert not ours(hidden, weight, targets, torch.zeros(40), all_masked)[1].any() and not all_masked.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_not_hidden(dtype, kept):
    hidden, weight, targets, grad = case(3, 8, 100, dtype)
    hidden[1, 2] = torch.nan
    weight_grad = torch.zeros(weight.shape)
    logprobs, hidden_grad = ours(hidden, weight, targets, grad, weight_grad)
    assert logprobs.isnan().tolist() == hidden_grad.isnan().all(1).tolist() == [False, True, False]
    assert hidden_grad.isnan().any(1).tolist() == [False, True, False]
    assert weight_grad.isnan().all()


def test_no_positions_give_nothing():
    hidden, weight, targets, grad = (x[:0] if i != 1 else x for i, x in enumerate(case(3, 8, 100)))
    weight_grad = torch.zeros(weight.shape)
    logprobs, hidden_grad = ours(hidden, weight, targets, grad, weight_grad)
    assert logprobs.shape == (0,) and hidden_grad.shape == (0, 8) and not weight_grad.any()


def test_finite_differences():
    """Through what surrounds the operator, in directions of both inputs."""
    hidden, weight, targets, grad = case(5, 16, 1000, scale=1.0)
    weight_grad = torch.zeros(weight.shape)
    hidden_grad = ours(hidden.tanh(), weight, targets, grad, weight_grad)[1]

    def value(x, w):
        found = (x.double() @ w.double().T).log_softmax(1).gather(1, targets[:, None])[:, 0]
        return (found * grad).sum()

    for _ in range(3):
        x, w = torch.randn(hidden.shape), torch.randn(weight.shape)
        step = 1e-4
        ends = [value(hidden.tanh() + s * x, weight + s * w) for s in (-step, step)]
        expected = (ends[1] - ends[0]) / (2 * step)
        assert (hidden_grad * x).sum() + (weight_grad * w).sum() == pytest.approx(expected.item(), rel=1e-3)


def test_autocast_does_not_touch_it():
    hidden, weight, targets, grad = case(40, 24, 1537)
    plain = ours(hidden, weight, targets, grad, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours(hidden, weight, targets, grad, None)
    assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_it_keeps_the_rules_of_torchs_operators(keep):
    hidden, weight, targets, grad = case(5, 8, 3000)
    found = torch.library.opcheck(head_op.logprob_and_normalizer, (hidden, weight, targets, keep))
    assert set(found.values()) == {"SUCCESS"}
    _, log_sum_exp, kept = head_op.logprob_and_normalizer(hidden, weight, targets, keep)
    for weight_grad in (torch.zeros(weight.shape), None):
        workspace = torch.empty(0, dtype=torch.uint8)
        given = (hidden, weight, targets, log_sum_exp, grad, kept, weight_grad, workspace)
        assert set(torch.library.opcheck(head_op.head_gradients, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.zeros(100, 7), r"give contiguous torch.float32 \(100, 8\)"),
        (torch.zeros(100, 8).half(), "weight_grad is torch.float16"),
        (torch.zeros(8, 100).T, "contiguous"),
    ],
)
def test_a_buffer_that_does_not_fit_is_named(buffer, message):
    hidden, weight, targets, _ = case(3, 8, 100)
    with pytest.raises(ValueError, match=message):
        accumulating_logprob(hidden, weight, targets, buffer)


class _Allocated(TorchDispatchMode):
    """The bytes of each result of an operator, the largest first."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.untyped_storage().nbytes())
        return result


def test_a_plan_sees_the_working_memory_and_no_logits():
    """Qwen2-0.5B, 4,096 positions in bf16: logits would be 1.2 GB, and the weight's gradient in fp32 545 MB."""
    with FakeTensorMode():
        hidden = torch.empty(4096, 896, dtype=torch.bfloat16, requires_grad=True)
        weight, targets = torch.empty(151_936, 896, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.int64)
        weight_grad = torch.empty(151_936, 896)
        with _Allocated() as allocated:
            logprobs = accumulating_logprob(hidden, weight, targets, weight_grad)
            logprobs.sum().backward()
    assert hidden.grad.shape == hidden.shape and hidden.grad.dtype == torch.bfloat16
    workspace = backward_workspace(4096, 896, 151_936, 2).bytes
    assert max(allocated.sizes) == workspace
    assert workspace <= 128 * MIB < 0.11 * 4096 * 151_936 * 2


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("count", [1, 37, 4096, 100_000])
def test_the_working_memory_is_bounded(count, element_size):
    parts = backward_workspace(count, 1536, 151_936, element_size)
    assert parts.bytes <= min(count, 4096) * (16_384 * 6 + 1536 * 4) + 16_384 * 1536 * 4 + 1024
    assert parts.bytes <= 2 * 64 * MIB + 100 * MIB
    if element_size == 4:
        assert parts.gradient == parts.product == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_on_a_cpu_stays_far_under_full_logits(dtype):
    """Peak of a child process over a step of 4,000 positions and 60,000 words: logits would be 916 MiB."""
    child = """
import resource, torch
from slmfast.kernels import head_op
head_op.KEPT_BYTES = 0
dtype = torch.DTYPE
hidden, weight = torch.randn(4000, 16, dtype=dtype, requires_grad=True), torch.randn(60_000, 16, dtype=dtype)
targets, buffer = torch.randint(60_000, (4000,)), torch.zeros(60_000, 16)
head_op.accumulating_logprob(hidden[:8], weight[:64], targets[:8] % 64, buffer[:64]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
head_op.accumulating_logprob(hidden, weight, targets, buffer).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
""".replace("DTYPE", dtype)
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.1 * 916


def test_triton_equals_float64_in_the_interpreter():
    pytest.importorskip("triton", reason="no Triton on this platform")
    script = Path(__file__).parent / "interpreted_head_backward.py"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4 * (8 * 5 + 3) + 2 + 6
    assert {name: error for name, error in errors.items() if error > 1} == {}


@pytest.mark.parametrize("largest", [1e-30, 3e-6, 1.0, 7.0, 1e9, 0.0])
def test_fp16_gradients_are_scaled_into_its_range(largest):
    tiled_backward = pytest.importorskip("slmfast.kernels.tiled_backward", reason="no Triton on this platform")
    grad = torch.tensor([largest, -largest / 3])
    scale = tiled_backward._scale(grad, torch.float16)
    assert torch.frexp(scale)[0].item() == 0.5  # a power of two
    assert largest in (0.0, 1e-30) or 2**13 <= (grad * scale).abs().max() <= 2**14
    assert tiled_backward._scale(grad, torch.bfloat16).item() == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [896, 100])
def test_every_way_equals_float64_on_the_device(dtype, width):
    from slmfast.kernels import tiled_backward

    hidden, weight, targets, grad = (x.cuda() for x in case(300, width, 151_936, dtype))
    true, usual = (by_autograd(hidden, weight, targets, grad, kind)[1:] for kind in (torch.float64, dtype))
    _, log_sum_exp, _ = head_op.logprob_and_normalizer(hidden, weight, targets, 0)
    size = backward_workspace(300, width, 151_936, hidden.element_size()).bytes
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    for tiles in tiled_backward.choices(hidden, weight):
        weight_grad = torch.zeros(weight.shape, device="cuda")
        given = (hidden, weight, targets, log_sum_exp, grad, weight_grad, workspace)
        found = tiled_backward.accumulate(*given, tiles=tiles), weight_grad
        for mine, theirs, exact in zip(found, usual, true, strict=True):
            assert (mine - exact).norm() <= (theirs - exact).norm() + 1e-5 * exact.norm()
        again = torch.zeros(weight.shape, device="cuda")
        tiled_backward.accumulate(*given[:5], again, workspace, tiles=tiles)
        assert torch.equal(again, weight_grad)
