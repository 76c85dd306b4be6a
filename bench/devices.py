"""The device of a benchmark: the one that --device names, and what it is called."""

import torch

from slmfast.errors import UserError


def chosen_device(named: str | None) -> torch.device:
    """The device that --device names; without it CUDA's where there is one.

    Raises:
        UserError: cuda is named, and there is none.
    """
    cuda = torch.cuda.is_available()
    if named == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no CUDA device; give --device cpu")
    return torch.device(named or ("cuda" if cuda else "cpu"))


def device_name(device: torch.device) -> str | None:
    """What a GPU is called; None for the processor, which the line of JSON names itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
