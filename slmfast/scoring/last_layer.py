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
    mlps = [getattr(layer, "mlp", None) for layer in getattr(decoder, "layers", ())]
    mlp = mlps[-1] if mlps else None
    # One that layers share would give an earlier layer zeros where they are read.
    if mlp is None or not is_gated(mlp) or sum(other is mlp for other in mlps) > 1:
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
