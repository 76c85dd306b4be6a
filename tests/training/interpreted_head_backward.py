"""Runs the head's backward kernels in Triton's interpreter (TRITON_INTERPRET=1) against float64; a test starts it.

Fresh memory is NaN here, so that an output which a kernel leaves unwritten shows. Prints one JSON object: by case the
largest error in units of what the plain formula in the inputs' dtype may err, plus a little.
"""

import contextlib
import json
import os
import tempfile

import torch

LITTLE = 1e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = (
    *((5, 33, 773, dtype) for dtype in (F32, F16, BF16)),
    *((1, 8, 2, F16), (130, 40, 300, BF16), (65, 20, 256, F32), (66, 64, 513, F16), (3, 16, 1, BF16)),
)


def poisoned(make):
    def filled(*arguments, **options):
        tensor = make(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(255)

    return filled


def by_autograd(hidden, weight, targets, grad, dtype):
    """Gradients of hidden and weight through a plain log-softmax, computed in one dtype."""
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    logprobs = (hidden @ weight.T).to(torch.promote_types(dtype, torch.float32)).log_softmax(1)
    logprobs.gather(1, targets[:, None])[:, 0].backward(grad.to(logprobs.dtype))
    return hidden.grad.double(), weight.grad.double()


def cases():
    for n, h, v, dtype in SHAPES:
        hidden, weight = torch.randn(n, h).to(dtype), (torch.randn(v, h) * 4 / h**0.5).to(dtype)
        targets = torch.cat([torch.tensor([0, v - 1, min(v, 256) - 1, 256 % v]), torch.randint(v, (n,))])[:n]
        yield f"{n}x{h}x{v} {dtype}", (hidden, weight, targets, torch.randn(n))


def main():
    torch.manual_seed(0)
    from slmfast.kernels import fastest, head_op, launch, tiled_backward

    # several tiles each way in a small problem, as 64 MiB and 4096 positions are none: the interpreter is slow
    launch.TILED_POSITIONS, launch.BACKWARD_BYTES = 64, 4 * 64 * 256
    recompute = launch.FusedTiles(block_n=32, block_v=64, block_h=32, warps=4, stages=2)
    product = launch.ProductTiles(block_m=64, block_k=16, block_j=32, warps=4, stages=2)
    ways = [launch.BackwardTiles(recompute=r, product=p) for r in (recompute, None) for p in (product, None)]
    given = [(name, x, *(by_autograd(*x, d) for d in (torch.float64, x[0].dtype))) for name, x in cases()]
    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)

    def run(tiles, hidden, weight, targets, grad, weight_grad):
        log_sum_exp = (hidden.double() @ weight.double().T).logsumexp(1).float()
        size = launch.backward_workspace(*hidden.shape, len(weight), hidden.element_size()).bytes
        workspace = torch.empty(size, dtype=torch.uint8)
        found = tiled_backward.accumulate(
            hidden, weight, targets, log_sum_exp, grad, weight_grad, workspace, tiles=tiles
        )
        assert found.dtype == hidden.dtype
        return found

    def error(got, true, usual):
        worst = (got.double() - true).abs().max() / ((usual - true).abs().max() + LITTLE)
        return worst.item() if worst.isfinite() else 1e9

    found = {}
    for tiles in ways:
        kind = f"{'fused' if tiles.recompute else 'BLAS'}, {'kernel' if tiles.product else 'BLAS'}"
        for name, (hidden, weight, targets, grad), true, usual in given:
            # a buffer that holds something already, a column slice of another one
            weight_grad = torch.ones(len(weight), 2 * weight.shape[1])[:, : weight.shape[1]]
            strided = torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]]
            for x in (hidden, strided):
                mine = run(tiles, x, weight, targets, grad, weight_grad)
                found[f"{kind} {name} hidden{' strided' * (x is strided)}"] = error(mine, true[0], usual[0])
            found[f"{kind} {name} weight twice"] = error((weight_grad - 1) / 2, true[1], usual[1])
            frozen = run(tiles, hidden, weight, targets, grad, None)
            masked, before = torch.zeros(len(grad)), weight_grad.clone()
            still = run(tiles, hidden, weight, targets, masked, weight_grad)
            found[f"{kind} {name} frozen"] = 0.0 if torch.equal(frozen, mine) else 1e9
            found[f"{kind} {name} masked"] = 1e9 * float(bool(still.any()) or not torch.equal(before, weight_grad))
        broken = hidden.clone()
        broken[1] = torch.nan
        weight_grad = torch.zeros(weight.shape)
        lost = run(tiles, broken, weight, targets, grad, weight_grad).isnan().all(1).tolist()
        found[f"{kind}: NaN stays in its row"] = 0.0 if lost == [False, True, False] else 1e9
        found[f"{kind}: NaN reaches the weight"] = 0.0 if weight_grad.isnan().all() else 1e9
        nothing = run(tiles, hidden[:0], weight, targets[:0], grad[:0], weight_grad)
        found[f"{kind}: no positions"] = float(len(nothing))
    print(json.dumps(found | scaled(run, ways) | chosen(head_op, fastest, launch, by_autograd)))


def scaled(run, ways):
    """fp16's scaling, which the interpreter leaves out with the dtype: the same result under any power of two."""
    from slmfast.kernels import tiled_backward

    hidden, weight, targets, grad = next(x for name, x in cases() if name.startswith("66"))
    found = {}
    for tiles in ways:
        if tiles.product is not None:
            plain, moved = torch.zeros(2, *weight.shape)
            run(tiles, hidden, weight, targets, grad, plain)
            original, tiled_backward._scale = tiled_backward._scale, lambda grad, dtype: grad.new_full((1,), 1024.0)
            run(tiles, hidden, weight, targets, grad, moved)
            tiled_backward._scale = original
            found[f"scaled {tiles.name}"] = 0.0 if torch.equal(plain, moved) else 1e9
    return found


def chosen(head_op, fastest, launch, by_autograd):
    """The operator as CUDA runs it when each candidate in turn is the fastest: measuring must leave no trace."""
    from slmfast.kernels import linear_logprob

    # what only a device could tell
    linear_logprob.SM86, torch.cuda.get_device_name = (8, 6), lambda _: "a device"
    torch.cuda.device = lambda _: contextlib.nullcontext()
    hidden, weight = torch.randn(3, 64).bfloat16(), torch.randn(300, 64).bfloat16() / 8
    targets, grad = torch.tensor([0, 9, 299]), torch.tensor([1.0, 0.0, -2.0])
    true = by_autograd(hidden, weight, targets, grad, torch.float64)
    log_sum_exp = (hidden.double() @ weight.double().T).logsumexp(1).float()
    workspace = torch.empty(launch.backward_workspace(3, 64, 300, 2).bytes, dtype=torch.uint8)
    found = {}
    for turn in range(6):
        calls = []

        def time(candidate, turn=turn, calls=calls):
            candidate()
            calls.append(candidate)
            return float(len(calls) - 1 != turn)

        head_op._milliseconds = time
        weight_grad = torch.zeros(300, 64)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            mine = head_op._fastest_backward(hidden, weight, targets, log_sum_exp, grad, weight_grad, workspace)
            (name,) = json.loads(fastest.cache_file().read_text()).values()
        # in the interpreter products are fp32, only the result is rounded to bf16
        worst = max((mine.double() - true[0]).abs().max() / 2e-2, (weight_grad - true[1]).abs().max() / LITTLE)
        found[f"chosen: {name}"] = worst.item()
    return found


main()
