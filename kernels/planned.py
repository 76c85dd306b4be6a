"""Which path a tensor takes: that of CUDA devices, or a CPU's.

Fake tensors (torch's FakeTensorMode) have shapes and no values. A plan of memory runs a step on them on machines
without a GPU, where they must lie on a CPU; they stand for a CUDA device everywhere.
"""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def like_cuda(tensor: Tensor) -> bool:
    """Whether a tensor lies on a CUDA device, or stands for one that does."""
    return tensor.is_cuda or isinstance(tensor, FakeTensor)
