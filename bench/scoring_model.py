"""The models that scoring is measured on: published shapes with random weights, which no download is needed for."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config
from transformers.initialization import no_init_weights

from slmfast.errors import UserError

_QWEN2 = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
"""By the model cards and the published configurations; the rest is Qwen2's default."""

# Spread of the logits. A Qwen2 of transformers' own initial weights has 0.6, nearly the uniform distribution, under
# which an error of a softmax would not show.
LOGITS = 3.0
SMALL = 0.1  # of biases, and of norms around 1


def model_config(source: str | Path) -> Any:
    """The configuration of a folder, or of a shape known by its name.

    Raises:
        UserError: there is neither such a shape nor a readable configuration.
    """
    if str(source) in SHAPES:
        return Qwen2Config(**_QWEN2, **SHAPES[str(source)])
    if not (Path(source) / "config.json").is_file():
        known = ", ".join(SHAPES)
        raise UserError(f"--model-config {source}: no config.json there; give a model's folder or one of {known}")
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model-config {source}: {str(error).splitlines()[0]}; give a model's folder") from error


def with_layers(config: Any, layers: int) -> Any:
    """The same configuration, changed in place to so many layers, of as many as it has."""
    inner = config.get_text_config()
    inner.num_hidden_layers = layers
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:layers]
    return config


def random_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    """A causal language model in evaluation mode, whose weights are a function of the seed on a kind of device.

    Matrices keep the size of what passes through them, and the logits spread by LOGITS, so that attention looks at
    some tokens more than at others and a token left out of a score changes it.
    """
    with no_init_weights(), device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(1.0 if "norm" in name else 0.0, SMALL, generator=generator)
            else:
                size = LOGITS if id(weight) in vocabulary else 1.0
                weight.normal_(0.0, size / weight.shape[1] ** 0.5, generator=generator)
    return model.eval()


def in_fp32(model: nn.Module) -> nn.Module:
    """A second model with exactly the same weights in fp32: the truth that low precision is measured against."""
    return copy.deepcopy(model).float()
