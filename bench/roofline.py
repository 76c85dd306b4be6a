"""What a machine can do at most: the rate of a plain matrix product and of a copy, and what a forward needs."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from slmfast.kernels.cpu_products import linear, serves

REPEATS = 5
# Edge of the square matrices, and bytes that are copied: large enough to leave the caches.
EDGE = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The shortest of a few runs after one that warms up; waits for the device."""
    call()
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device, edge: int | None = None) -> float:
    """Floating-point operations a second of the product of two square matrices, by the faster of torch's libraries."""
    n = edge or EDGE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    ways = [lambda: torch.mm(a, b, out=out)]
    with torch.no_grad():
        if serves(a, b):
            ways.append(lambda: linear(a, b))
        return 2 * n**3 / min(seconds(way, device) for way in ways)


def copy_rate(device: torch.device, count: int | None = None) -> float:
    """Bytes a second of a copy within the device's memory, read and written ones counted."""
    n = count or COPIED[device.type]
    source = torch.ones(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * n / seconds(lambda: target.copy_(source), device)


def needed_flops(model: nn.Module, groups: Sequence[tuple[int, Sequence[int]]], shared: int = 0) -> float:
    """Floating-point operations of scoring without padding, with each prompt once and the head on replies alone.

    Two for each weight of the layers and token, four for each width of attention, layer, query and key that it sees,
    and two for each weight of the head and scored token.

    Args:
        groups: of each prompt its tokens, and those of its replies with the closing one. A reply's last token is
            scored but never computed on.
        shared: tokens that all prompts begin with, which are computed once.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    skipped = {id(head), id(model.get_input_embeddings().weight)}
    weights = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and id(weight) not in skipped)
    computed = shared - shared * len(groups)
    seen = _triangle(shared) - _triangle(shared) * len(groups)
    scored = 0
    for prompt, replies in groups:
        computed += prompt + sum(reply - 1 for reply in replies)
        seen += _triangle(prompt) + sum((reply - 1) * prompt + _triangle(reply - 1) for reply in replies)
        scored += sum(replies)
    per_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * per_head * seen
    return 2.0 * weights * computed + attention + 2.0 * head.numel() * scored


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
