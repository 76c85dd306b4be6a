"""The starting model of a training run and its tokenizer, loaded and checked."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmfast.errors import UserError
from slmfast.model_folder import ModelWeights, check_model_folder
from slmfast.scoring.head import head_weight
from slmfast.scoring.loading import check_complete


def load_model(path: Path) -> nn.Module:
    """Loads a causal language model in fp32, its tensors in memory of their own.

    Raises UserError where that fails, and where its logits are more than its LM head makes of the hidden states.
    """
    check_model_folder(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        check_complete(path, info)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path} can't be loaded as a causal language model ({_one_line(error)}): check it") from error
    for parameter in model.parameters():
        # Loaded tensors lie at other alignments than fresh ones, where a matrix product may take another path.
        parameter.data = parameter.data.clone()
    head_weight(model)  # training computes logits as scoring does, and is wrong where scoring is
    return model


def load_tokenizer(path: Path) -> Any:
    """Loads a model folder's tokenizer, which must have a chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no tokenizer that can be loaded ({_one_line(error)}): copy it there") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {path} has no chat template: add chat_template.jinja")
    return tokenizer


def check_names(path: Path, model: nn.Module) -> None:
    """Refuses, before any work, a model whose files name their tensors otherwise than the result would."""
    with ModelWeights(path) as base:
        odd = sorted(set(base.names) ^ {name for name, _ in model.named_parameters()})[:3]
    if odd:
        raise UserError(f"{path} names its tensors otherwise than transformers does ({odd}): save it anew")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
