"""Runs the 8-bit AdamW kernel in Triton's interpreter (TRITON_INTERPRET=1) beside its twin; a test starts it.

Every tensor is the inside of a longer one whose ends must stay as they are. Prints one JSON object: for each case the
names of the tensors whose bits differ, or whose surroundings were written to.
"""

import json

import torch

GUARD = 512
HUGE = (1e30, 1e-30, 1e-45, -1e-45, 0.0, -0.0, 1e38, 3.4e38)


def guarded(tensor, fill):
    """The same values inside longer memory, and that memory."""
    whole = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
    inside = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside, whole


def start(count, kind, generator):
    """Weights of a case with all that a step changes, by name."""
    rows = -(-count // 256)
    weights = torch.randn(count, generator=generator) * {"usual": 0.02, "coarse": 0.7, "odd": 1.0}[kind]
    if kind == "odd":
        weights = torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator).int().view(torch.float32)
    bits = weights.view(torch.int32)
    high = (bits + 0x8000) >> 16
    tensors = {"high": high.short(), "low": (bits - (high << 16)).short()}
    for name in ("first", "second"):
        tensors[name] = torch.randint(256, (count,), generator=generator).to(torch.uint8)
    for name in ("first_scale", "second_scale"):
        tensors[name] = torch.rand(rows, generator=generator) * (1e-4 if name == "first_scale" else 1e-7)
    slots = torch.empty(0, dtype=torch.int32)
    if kind != "usual":
        slots = torch.full((rows,), -1, dtype=torch.int32)
        held = torch.arange(0, rows, 2)
        slots[held] = torch.randperm(len(held), generator=generator).int()
    lowest = torch.randint(-32768, 32768, (int(slots.max()) + 1 if len(slots) else 0, 256), generator=generator)
    return tensors | {"slots": slots, "lowest": lowest.short()}


def gradients(count, kind, generator):
    found = torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 12 - 14)
    if kind == "odd":
        found[torch.rand(count, generator=generator) < 0.3] = 0.0
        for value in HUGE:
            found[int(torch.randint(count, (), generator=generator))] = value
    return found


def differing(count, kind, rows, seed):
    from slmfast.kernels import adamw8bit, eager_adamw8bit
    from slmfast.kernels.launch import Adamw8bitBlocks

    generator = torch.Generator().manual_seed(seed)
    begin = start(count, kind, generator)
    sides = [{name: guarded(tensor, 77) for name, tensor in begin.items()} for _ in range(2)]
    for number in (1, 2, 1000):
        gradient = gradients(count, kind, generator)
        scalars = (0.9, 0.1, 0.999, 0.001, -1e-8 / (1 - 0.9**number), (1 - 0.999**number) ** -0.5, 1e-8)
        for side, step in zip(sides, (adamw8bit.step, eager_adamw8bit.step), strict=True):
            of = {name: inside for name, (inside, _) in side.items()}
            moments = [of[name] for name in ("first", "second", "first_scale", "second_scale")]
            more = {"blocks": Adamw8bitBlocks(rows=rows)} if step is adamw8bit.step else {}
            step(of["high"], of["low"], gradient, moments, of["slots"], of["lowest"], scalars, number, **more)
    found = []
    for name in begin:
        (mine, whole), (twin, _) = (side[name] for side in sides)
        same = torch.equal(mine, twin) if not mine.is_floating_point() else torch.equal(bits(mine), bits(twin))
        intact = (whole[:GUARD] == 77).all() and (whole[len(whole) - GUARD :] == 77).all()
        found += [name] * (not same) + [f"around {name}"] * (not intact)
    return found


def bits(scale):
    """The bits of scales, every NaN the same."""
    return scale.nan_to_num(nan=-1.0, posinf=torch.inf).view(torch.int32)


def main():
    found = {}
    for count in (1, 255, 256, 257, 1024, 5000):
        for kind in ("usual", "coarse", "odd"):
            for rows in (1, 4):
                found[f"{count} {kind} {rows}"] = differing(count, kind, rows, count)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
