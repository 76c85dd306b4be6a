"""A plan of the memory that scoring takes on CUDA devices, from a model's configuration alone: no weights are made."""

from collections.abc import Iterator
from typing import Any

import torch
from result_table import Result
from transformers import AutoModelForCausalLM

from slmfast.kernels.launch import transient_bytes
from slmfast.scoring.budget import LEAST_TOKENS, budget_for, bytes_per_token, key_width
from slmfast.scoring.packing import KEYS_A_TOKEN

GIB = 1 << 30
DEVICES = (12, 24, 80)  # GiB
CONTEXT = 3 * GIB // 2  # the device's context, cuBLAS, and what fragments


def memory_plan(name: str, config: Any, dtype: torch.dtype) -> Iterator[Result]:
    """A row a size of device: the tokens scored together, and what weights, layers, keys and the head take then."""
    weights = weight_bytes(config, dtype)
    inner = config.get_text_config()
    per_token = bytes_per_token(inner, dtype.itemsize)
    for size in DEVICES:
        common = {"group": "plan", "unit": "GiB"}
        what = f"plan, {name}, {str(dtype).removeprefix('torch.')}, {size} GiB of memory"
        free = size * GIB - CONTEXT - weights
        if free < LEAST_TOKENS * per_token:
            why = f"weights of {weights / GIB:.2f} GiB leave too little: does not fit"
            yield Result(**common, case=f"{what}: {why}", ours=weights / GIB)
            continue
        tokens = budget_for(free, per_token)
        layer, head = tokens * per_token, transient_bytes(tokens, inner.vocab_size)
        keys = tokens * KEYS_A_TOKEN * key_width(inner) * dtype.itemsize
        parts = (
            f"weights {weights / GIB:.2f}, a layer {layer / GIB:.2f} (keys and values of all paths {keys / GIB:.2f})"
        )
        case = f"{what}: {tokens} tokens, {parts}, head {head / GIB:.3f}"
        yield Result(**common, case=case, ours=(weights + layer + head) / GIB)


def weight_bytes(config: Any, dtype: torch.dtype) -> int:
    """Of a causal language model's parameters, tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
