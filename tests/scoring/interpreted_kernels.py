"""Runs the Triton kernels in Triton's interpreter (TRITON_INTERPRET=1) beside their eager twins; a test starts it.

Fresh memory is NaN here, so that an output which a kernel leaves unwritten shows. Prints one JSON object: the largest
error in units of the tolerance, by case.
"""

import json

import torch

empty = torch.empty


def poisoned(*shape, **options):
    tensor = empty(*shape, **options)
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def cases():
    from slmfast.kernels import linear_logprob as fused

    fused.STRETCH = 256  # several stretches in a small vocabulary: the interpreter is slow
    for n, h, v in ((1, 8, 2), (5, 33, 773), (130, 40, 300), (65, 20, 256), (66, 24, 513)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            hidden, weight = torch.randn(n, h), torch.randn(v, h) * 4 / h**0.5
            # the ends of the vocabulary and of its stretches, where an off-by-one would lose a target
            edges = torch.tensor([0, v - 1, min(v, fused.STRETCH) - 1, fused.STRETCH % v])
            targets = torch.cat([edges, torch.randint(v, (n,))])[:n]
            yield f"{n}x{h}x{v} {dtype}", hidden.to(dtype), weight.to(dtype), targets


def main():
    torch.manual_seed(0)
    torch.empty = poisoned
    from slmfast.kernels import linear_logprob as fused
    from slmfast.kernels import reference

    found = {}
    for name, hidden, weight, targets in cases():
        expected = reference.linear_logprob(hidden, weight, targets)
        # a column slice: rows that are not next to each other in memory
        strided = torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]]
        for kind, given in (("", hidden), (" strided", strided)):
            error = (fused.linear_logprob(given, weight, targets) - expected).abs().max()
            found[name + kind] = (error / 1e-5).item() if error.isfinite() else 1e9
    stray = fused.linear_logprob(hidden, weight, torch.full_like(targets, len(weight)))
    found["stray targets give NaN"] = 0.0 if stray.isnan().all() else 1e9
    found["no positions"] = float(len(fused.linear_logprob(hidden[:0], weight, targets[:0])))
    print(json.dumps(found))


main()
