"""The last layer's MLP at the places that predict something: what it gives anywhere else is read by nobody."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slmfast.scoring.cpu_layers import is_gated


@contextmanager
def only_at(places: Tensor, decoder: nn.Module) -> Iterator[None]:
    """Inside, the last layer's gated MLP computes `places` (int64, distinct) of its input [1, L, H], and zeros else.

    Keys and values are those of the layer's input, so that attention misses nothing. Another kind of MLP, such as a
    mixture of experts, computes all places.
    """
    mlp = getattr(decoder.layers[-1], "mlp", None) if hasattr(decoder, "layers") else None
    if mlp is None or not is_gated(mlp):
        yield
        return
    whole, own = mlp.forward, vars(mlp).get("forward")

    def narrow(x: Tensor) -> Tensor:
        found = whole(x.index_select(1, places))  # under autocast of another dtype than x
        return torch.zeros_like(x, dtype=found.dtype).index_copy_(1, places, found)

    mlp.forward = narrow
    try:
        yield
    finally:
        if own is None:
            del mlp.forward
        else:
            mlp.forward = own
