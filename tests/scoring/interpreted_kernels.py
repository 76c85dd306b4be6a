"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1) against float64; a test starts it.

Fresh memory is NaN here, so that an output which a kernel leaves unwritten shows. Prints one JSON object: the largest
error in units of the tolerance, by case.
"""

import contextlib
import json
import os
import tempfile

import torch

TOLERANCE = 1e-5
CANDIDATES = 5
SHAPES = ((1, 8, 2), (5, 33, 773), (130, 40, 300), (65, 20, 256), (66, 64, 513), (3, 16, 1))


def poisoned(make):
    def filled(*arguments, **options):
        tensor = make(*arguments, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return filled


def truth(hidden, weight, targets):
    """Log-probabilities and entropies by the plainest formula, float64."""
    logprobs = (hidden.double() @ weight.double().T).log_softmax(1)
    return logprobs[torch.arange(len(targets)), targets], -(logprobs.exp() * logprobs).sum(1)


def cases(stretch):
    for n, h, v in SHAPES:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            hidden, weight = torch.randn(n, h), torch.randn(v, h) * 4 / h**0.5
            # the ends of the vocabulary and of its stretches, where an off-by-one would lose a target
            edges = torch.tensor([0, v - 1, min(v, stretch) - 1, stretch % v])
            targets = torch.cat([edges, torch.randint(v, (n,))])[:n]
            yield f"{n}x{h}x{v} {dtype}", hidden.to(dtype), weight.to(dtype), targets


def error(got, expected):
    worst = (got - expected).abs().max()
    return (worst / TOLERANCE).item() if worst.isfinite() else 1e9


def chosen():
    """The operator as CUDA runs it, when each of Hopper's candidates in turn is the fastest: errors by candidate."""
    from slmfast.kernels import fastest, head_op, linear_logprob

    # what only a device could tell
    linear_logprob.SM86, torch.cuda.get_device_name = (9, 0), lambda _: "a device"
    torch.cuda.device = lambda _: contextlib.nullcontext()
    hidden, weight, targets = (
        torch.randn(3, 64).bfloat16(),
        torch.randn(300, 64).bfloat16() / 8,
        torch.tensor([0, 9, 299]),
    )
    expected, found = truth(hidden, weight, targets), {}
    for turn in range(CANDIDATES):
        times = iter([1.0] * turn + [0.0] + [1.0] * CANDIDATES)
        head_op._milliseconds = lambda candidate, times=times: next(times)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache
            got = head_op._fastest_on_cuda(hidden, weight, targets, True).found(True)
            (name,) = json.loads(fastest.cache_file().read_text()).values()
        found[f"chosen: {name}"] = max(error(mine, true) for mine, true in zip(got, expected, strict=True))
    return found


def main():
    torch.manual_seed(0)
    from slmfast.kernels import linear_logprob, tiled_logprob
    from slmfast.kernels.launch import FusedTiles

    # several stretches and tiles in a small vocabulary: the interpreter is slow
    tiles = FusedTiles(block_n=64, block_v=64, block_h=32, warps=4, stages=2, stretch=256)
    kernels = {"fused": (linear_logprob, {"tiles": tiles}), "tiled": (tiled_logprob, {"tile_bytes": 1})}
    given = [(*case, truth(*case[1:])) for case in cases(tiles.stretch)]
    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)
    found = {}
    for kind, (kernel, size) in kernels.items():
        for name, hidden, weight, targets, (logprobs, entropies) in given:
            got, spread = kernel.linear_logprob(hidden, weight, targets, entropy=True, **size)
            found[f"{kind} {name}"] = error(got, logprobs)
            found[f"{kind} {name} entropy"] = error(spread, entropies)
            largest = (hidden.double() @ weight.double().T).argmax(1)
            for aim, expected in ((targets, targets == largest), (largest, torch.ones_like(targets, dtype=torch.bool))):
                greedy = kernel.log_sums(hidden, weight, aim, **size).greedy()
                found[f"{kind} {name} greedy {aim is largest}"] = 0.0 if torch.equal(greedy, expected) else 1e9
            # a column slice: rows that are not next to each other in memory
            strided = torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]]
            found[f"{kind} {name} strided"] = error(kernel.linear_logprob(strided, weight, targets, **size), logprobs)
        stray = kernel.linear_logprob(hidden, weight, torch.full_like(targets, len(weight)), **size)
        found[f"{kind}: stray targets give NaN"] = 0.0 if stray.isnan().all() else 1e9
        broken = hidden.clone()
        broken[1] = torch.nan
        lost = [x.isnan().tolist() for x in kernel.linear_logprob(broken, weight, targets, entropy=True, **size)]
        found[f"{kind}: NaN stays in its row"] = 0.0 if lost == [[False, True, False]] * 2 else 1e9
        found[f"{kind}: no positions"] = float(len(kernel.linear_logprob(hidden[:0], weight, targets[:0], **size)))
    print(json.dumps(found | chosen()))


main()
