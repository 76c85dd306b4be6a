"""How many bytes of tensors live while code runs, and the most that lived at once.

A dispatch mode of torch sees what every operator returns, in the forward pass as in the backward, and is told when a
storage goes; so does torch's own MemTracker (torch.distributed._tools.mem_tracker). Real tensors and fake ones count
alike, views once. What an operator allocates and frees inside itself is not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NEW = "temporaries"


@dataclass
class _Storage:
    reference: weakref.ref  # whose callback tells that it has gone
    kind: str
    size: int
    number: int  # in the order of their making


class LiveBytes(TorchDispatchMode):
    """Counts inside its context; what was there before counts from when `add` is told of it.

    Every storage has a kind. That of a new one is `NEW` until `add` says otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        """Bytes of each kind, now."""
        self.peak: dict[str, int] = {}
        """Bytes of each kind when all of them together were most."""
        self._most = 0
        self._seen = self._seen_at_peak = 0  # how many storages there have been
        self._known: dict[int, _Storage] = {}  # by the storage's address

    @property
    def peak_bytes(self) -> int:
        """The most that lived at once."""
        return self._most

    def reset_peak(self) -> None:
        """Starts looking for the most anew."""
        self._most = 0
        self._look()

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts the storages of tensors as of this kind, whatever they were before."""
        for tensor in tensors:
            self._count(tensor, kind)

    def rename_new(self, kind: str) -> None:
        """What is new, and lives, is of this kind from now on, and was at the peak if it lived by then."""
        for storage in self._known.values():
            if storage.kind == NEW:
                storage.kind = kind
                if storage.number <= self._seen_at_peak:
                    self.peak[NEW] -= storage.size
                    self.peak[kind] = self.peak.get(kind, 0) + storage.size
        self.live[kind] += self.live.pop(NEW, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf, None)
        return result

    def _count(self, tensor: Tensor, kind: str | None) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._known.get(address)
        if known is not None:
            if kind is not None:
                self.live[known.kind] -= known.size
                self.live[kind] += known.size
                known.kind = kind
            return
        self._seen += 1
        reference = weakref.ref(storage, lambda _: self._forget(address))
        self._known[address] = known = _Storage(reference, kind or NEW, storage.nbytes(), self._seen)
        self.live[known.kind] += known.size
        self._look()

    def _forget(self, address: int) -> None:
        gone = self._known.pop(address)
        self.live[gone.kind] -= gone.size

    def _look(self) -> None:
        total = self.live.total()
        if total > self._most:
            self._most, self.peak, self._seen_at_peak = total, dict(self.live), self._seen
