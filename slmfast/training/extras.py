"""What other packages add to a model before it trains, where the settings ask for it.

- LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: every linear layer but the LM head gets a trained update of low
  rank, all else stays as it is. What is saved is a whole model, the updates merged into its weights in fp32.
- The layers of Liger Kernel, on CUDA: norms, rotations and gated MLPs. Its heads are left out, since ours takes less.
"""

import importlib.util
from typing import Any

import torch
from torch import nn

from slmfast.errors import UserError
from slmfast.training.settings import TrainSettings


def check_extras(settings: TrainSettings) -> None:
    """Raises UserError where the settings ask for what is not installed or not served here."""
    if settings.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError(f"lora_rank is {settings.lora_rank}, but peft is not installed: pip install 'slmfast[lora]'")
    if not settings.liger:
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("liger is on, but liger-kernel is not installed: pip install liger-kernel, or set liger to off")
    if not torch.cuda.is_available():
        raise UserError("liger is on, but its kernels need a CUDA device: set liger to off")


def add_extras(model: nn.Module, settings: TrainSettings, seed: int = 0) -> None:
    """Changes a model in place as the settings ask; with neither of the two nothing changes.

    New adapters give zero, so that the model's outputs are what they were.

    Args:
        seed: of the random half of the adapters.
    """
    if settings.liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    if settings.lora_rank:
        add_adapters(model, settings, seed)


def add_adapters(model: nn.Module, settings: TrainSettings, seed: int = 0) -> None:
    """Puts a LoRA adapter on every linear layer but the LM head, and lets nothing else be trained."""
    import peft

    alpha = 2 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    config = peft.LoraConfig(r=settings.lora_rank, lora_alpha=alpha, target_modules="all-linear")
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config, model)


def merge_adapters(model: nn.Module) -> None:
    """Adds adapters to the weights that they stand beside and takes them away; a model without any stays as it is."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if _is_adapted(module):
                module.merge()
                setattr(parent, name, module.get_base_layer())


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
