"""How many tokens go through a model together: as many as its memory holds, up to where more gain nothing."""

from numbers import Integral

import torch
from torch import nn
from transformers import PreTrainedConfig

from slmfast.errors import UserError
from slmfast.scoring.packing import KEYS_A_TOKEN

CPU_TOKENS = 2048  # more gains nothing, and takes memory
CUDA_TOKENS = 32768
LEAST_TOKENS = 256
# Of the free memory of a device; the rest is for the LM head's tiles, cuBLAS, and what fragments.
USABLE = 0.7


def checked_budget(tokens: int | None, model: nn.Module) -> int:
    """The tokens that are asked for, or what the memory gives. Raises UserError where they are no number."""
    if tokens is None:
        return token_budget(model)
    if not isinstance(tokens, Integral) or tokens < 1:
        raise UserError(f"batch_tokens is {tokens!r}: give a positive number of tokens")
    return int(tokens)


def token_budget(model: nn.Module) -> int:
    """Tokens of a batch for which a model's forward pass has room on its device now, a power of two.

    On a CPU the caches decide, not the memory, and the answer is always the same.
    """
    weight = model.get_output_embeddings().weight
    if not weight.is_cuda:
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(weight.device)
    return budget_for(free, bytes_per_token(model.config.get_text_config(), weight.element_size()))


def bytes_per_token(config: PreTrainedConfig, size: int) -> int:
    """What a layer holds for a token: its input, the three arrays of a gated MLP, and the keys and values of paths."""
    hidden = config.hidden_size
    widest = _largest(config, "intermediate_size") or 4 * hidden
    return size * (8 * hidden + 3 * widest + KEYS_A_TOKEN * key_width(config))


def key_width(config: PreTrainedConfig) -> int:
    """Numbers in one token's keys and values of the widest layer; 0 where a configuration names no heads.

    Layers that attend otherwise, which have none, are not packed. Multi-head latent attention (DeepSeek-V2, arXiv
    2405.04434) has keys of two parts and values of a width of their own.
    """
    heads = _largest(config, "num_attention_heads")
    if not heads:
        return 0
    if latent := _largest(config, "qk_nope_head_dim"):
        return heads * (latent + _largest(config, "qk_rope_head_dim") + _largest(config, "v_head_dim"))
    width = _largest(config, "head_dim") or config.hidden_size // heads
    return 2 * (_largest(config, "num_key_value_heads") or heads) * width


def _largest(config: PreTrainedConfig, name: str) -> int:
    """A number of a configuration, the largest where each layer has its own; 0 where it is not there."""
    value = config.to_dict().get(config.attribute_map.get(name, name))
    return max(value, default=0) if isinstance(value, list | tuple) else value or 0


def budget_for(free: int, per_token: int) -> int:
    """The largest power of two whose tokens take no more than the usable part of `free` bytes, within the limits."""
    room = max(LEAST_TOKENS, min(CUDA_TOKENS, int(free * USABLE) // per_token))
    return 1 << (room.bit_length() - 1)
