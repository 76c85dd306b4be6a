"""Whether a model can run packs, and if it can't, why."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from slmfast.errors import UserError
from slmfast.scoring.attention import LAYER_TYPES, packing
from slmfast.scoring.batches import Batch, make_batches
from slmfast.scoring.cpu_layers import faster_layers
from slmfast.scoring.loading import evaluating
from slmfast.scoring.packing import Group


def why_not_packed(model: nn.Module) -> str | None:
    """What keeps packs from giving this model the separate sequences' result, in words; None if nothing does.

    Its layers must attend through transformers' registry, all over the whole sequence or a window, and its rotations
    must not depend on the longest position of a call. A few tokens are run both ways: what a model's code does beside
    that is found by its result.
    """
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    if rotates_by_length(model):
        return "its rotations depend on the longest position of a call"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention does not run through transformers' registry"
    if len({parameter.device for parameter in model.parameters()}) > 1:  # a layout lies on one
        return "it is spread over several devices"
    return _why_packs_differ(model, config)


def rotates_by_length(model: nn.Module) -> bool:
    """Whether a token's rotation depends on the longest position of a call: then no sequence may share one."""
    rotation = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    several = [rotation, *(some for some in rotation.values() if isinstance(some, dict))]  # one for each kind of layer
    return any({some.get("rope_type"), some.get("type")} & {"dynamic", "longrope"} for some in several)


def _why_packs_differ(model: nn.Module, config: Any) -> str | None:
    """What is wrong with a prompt and two continuations in a pack, beside the hidden states of two sequences."""
    vocabulary = config.vocab_size
    prompt, *continuations = ([token % vocabulary for token in some] for some in ((0, 1, 2), (3, 4, 5), (6, 7)))
    group = Group(prompt, continuations)
    weight = model.get_output_embeddings().weight
    if isinstance(weight, FakeTensor):  # without values there is nothing to compare: a plan of memory trusts the code
        return None
    device = weight.device
    (apart,) = make_batches([group], 64, packed=False, device=device)
    (together,) = make_batches([group], 64, packed=True, device=device)
    with evaluating(model):
        expected = _in_order(apart, apart.hidden(model))
        try:
            with packing(model), faster_layers(model):
                found = _in_order(together, together.hidden(model))
        except UserError as error:  # its attention wants more than a pack gives
            return str(error)
        except TypeError as error:  # the layout is refused, or does not arrive; anything else is a fault of the code
            if "'layout'" not in str(error):
                raise
            return f"it does not hand its attention what its forward is given ({error})"
    # A window is longer than these few tokens: a model that hides its own in a mask gives the same states here.
    if sum(window is not None for window in together.layout.windows) < _windowed_layers(config):
        return "a layer's sliding window is in its mask alone"
    slack = 1e-4 if expected.dtype == torch.float32 else 2e-2
    # States may be no numbers: that is for the score itself to find.
    largest = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())
    same = torch.allclose(found.float(), expected.float(), rtol=slack, atol=slack * largest, equal_nan=True)
    return None if same else "a few tokens have other hidden states in a pack than as sequences of their own"


def _windowed_layers(config: Any) -> int:
    """How many layers see a sliding window alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return config.num_hidden_layers if getattr(config, "sliding_window", None) else 0
    return sum(kind == "sliding_attention" for kind in kinds)


def _in_order(batch: Batch, states: Tensor) -> Tensor:
    """States [T, H] by the number of the continuation that they belong to."""
    numbers = [batch.continuations[owner] for owner in batch.owners.tolist()]
    return states[sorted(range(len(numbers)), key=numbers.__getitem__)]
