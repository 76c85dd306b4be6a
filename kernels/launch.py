"""How the kernels are launched on each device: block sizes, and the limits of an RTX 3090 (sm_86).

The launchers and the gate that compiles for sm_86 without a GPU (bench/sm86.py) read the same numbers here. Where more
than one configuration is named, the fastest is found by measurement on the device and remembered (see fastest.py).

Shapes: N positions, H hidden width, V vocabulary.
"""

from dataclasses import dataclass

MIB = 1 << 20
SM86 = (8, 6)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one block of threads may use."""

    shared: int  # bytes of shared memory
    registers: int  # 32-bit registers of a thread


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 99 KB and 227 KB a block.
LIMITS = {86: Limits(shared=99 * 1024, registers=255), 90: Limits(shared=227 * 1024, registers=255)}


@dataclass(frozen=True, kw_only=True)
class FusedTiles:
    """One configuration of the fused LM head."""

    block_n: int  # positions of a program
    block_v: int  # vocabulary rows of a tile
    block_h: int  # hidden width of one step of the product
    warps: int
    stages: int  # tiles of hidden and weight in flight
    # Vocabulary rows of one program: 3.6 MB of bf16 weight at H = 896, which stay in a 6 MB L2 while all tiles of
    # positions (the grid's fast axis) use them.
    stretch: int = 2048

    def __post_init__(self) -> None:
        if self.stretch % self.block_v:
            raise ValueError(f"a stretch of {self.stretch} rows is no multiple of block_v={self.block_v}")

    @property
    def name(self) -> str:
        """The configuration in one word, as tables and the memory of choices show it."""
        return f"{self.block_n}x{self.block_v}x{self.block_h}/w{self.warps}s{self.stages}"

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "BLOCK_H": self.block_h,
            "STRETCH": self.stretch,
        }

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# On sm_86 all of these stay under 99 KB of shared memory and spill no register in the loops that use them: the gate
# says so. fp32 without TF32 leaves the tensor cores idle, and a larger tile of it would spill.
_HALF = (
    FusedTiles(block_n=128, block_v=128, block_h=32, warps=8, stages=3),
    FusedTiles(block_n=128, block_v=128, block_h=64, warps=8, stages=3),
)
# Hopper's blocks may use 227 KB of shared memory.
_HALF_HOPPER = (FusedTiles(block_n=128, block_v=256, block_h=64, warps=8, stages=3),)
_FULL = (FusedTiles(block_n=64, block_v=64, block_h=32, warps=4, stages=2),)
# Rows that don't start at multiples of 16 elements are loaded one by one, which costs an address in a register each.
_UNALIGNED = {
    2: (FusedTiles(block_n=64, block_v=128, block_h=32, warps=8, stages=2),),
    4: (FusedTiles(block_n=64, block_v=32, block_h=32, warps=4, stages=2),),
}


def fused_tiles(capability: tuple[int, int], element_size: int, divisor: int) -> tuple[FusedTiles, ...]:
    """The configurations of the fused LM head worth trying on a device.

    Args:
        capability: the device's compute capability; one that is not known gets what suits sm_86.
        element_size: 2 or 4 bytes.
        divisor: what divides H and the strides of hidden and weight; H itself where rows follow one another.
    """
    if divisor % 16:
        return _UNALIGNED[element_size]
    if element_size == 4:
        return _FULL
    # With a mask along H the larger tiles would spill.
    return _HALF + tuple(tiles for tiles in _HALF_HOPPER if capability == (9, 0) and divisor % tiles.block_h == 0)


@dataclass(frozen=True, kw_only=True)
class FoldTiles:
    """The configuration of the kernel that folds a tile of logits into its log-sum-exp."""

    block_n: int = 4  # positions of a program: one a warp
    block_v: int = 512  # logits of a position read at once
    warps: int = 4

    @property
    def name(self) -> str:
        """The configuration in one word."""
        return f"{self.block_n}x{self.block_v}/w{self.warps}"

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v}

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps}


FOLD = FoldTiles()
# fp32 logits that the cuBLAS path holds at once: one size that the L2 of a 3090 keeps, and one that keeps a larger
# device busy. 24 MiB are under a tenth of the 4096 x 32768 bf16 logits of TRL's chunked head.
TILED_BYTES = (4 * MIB, 24 * MIB)
TILED_POSITIONS = 4096


def tiled_shape(count: int, vocabulary: int, tile_bytes: int) -> tuple[int, int]:
    """Positions and vocabulary rows of one tile of fp32 logits of at most `tile_bytes`, for N and V."""
    rows = max(1, min(count, TILED_POSITIONS))
    # A multiple of 128 keeps cuBLAS on its fast kernels. A few positions don't need the whole vocabulary at once.
    columns = max(128, min(tile_bytes // (4 * rows), 16384) // 128 * 128)
    return rows, min(columns, vocabulary)


def transient_bytes(count: int, vocabulary: int) -> int:
    """The most that any CUDA forward holds beside its inputs and results, in bytes; for plans of memory.

    A plan sees the backward's memory by itself, since it is given to the operator (`backward_workspace`).
    """
    rows, columns = tiled_shape(count, vocabulary, max(TILED_BYTES))
    state = 4 * 4 * count  # four fp32 numbers a position
    stretches = -(-vocabulary // FusedTiles.stretch)
    return max(4 * rows * columns + state, stretches * 3 * 4 * count + state)


@dataclass(frozen=True, kw_only=True)
class GradientTiles:
    """The configuration of the kernel that turns a tile of logits into their gradient."""

    block_n: int = 4  # positions of a program: one a warp
    block_v: int = 512  # logits of a position
    warps: int = 4

    @property
    def name(self) -> str:
        """The configuration in one word."""
        return f"{self.block_n}x{self.block_v}/w{self.warps}"

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"BLOCK_N": self.block_n, "BLOCK_V": self.block_v}

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps}


@dataclass(frozen=True, kw_only=True)
class ProductTiles:
    """The configuration of the kernel that adds a product to a gradient."""

    block_m: int  # rows of the gradient of a program
    block_k: int  # its columns, along the hidden width
    block_j: int  # one step of the product
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The configuration in one word."""
        return f"{self.block_m}x{self.block_k}x{self.block_j}/w{self.warps}s{self.stages}"

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_K": self.block_k, "BLOCK_J": self.block_j}

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


GRADIENT = GradientTiles()
_PRODUCT = {
    2: ProductTiles(block_m=128, block_k=128, block_j=32, warps=8, stages=3),
    4: ProductTiles(block_m=64, block_k=64, block_j=32, warps=4, stages=2),
}
_PRODUCT_UNALIGNED = {
    2: ProductTiles(block_m=64, block_k=128, block_j=32, warps=8, stages=2),
    4: ProductTiles(block_m=64, block_k=32, block_j=32, warps=4, stages=2),
}


def product_tiles(element_size: int, divisor: int) -> ProductTiles:
    """The configuration of the product kernel for 2 or 4 bytes an element; `divisor` as in `fused_tiles`."""
    return (_PRODUCT_UNALIGNED if divisor % 16 else _PRODUCT)[element_size]


@dataclass(frozen=True, kw_only=True)
class BackwardTiles:
    """How the backward computes a tile of gradients, and what it adds: by a kernel of ours, or by cuBLAS (None)."""

    recompute: FusedTiles | None
    product: ProductTiles | None

    @property
    def name(self) -> str:
        """Both in a few words."""
        return " + ".join("cuBLAS" if tiles is None else tiles.name for tiles in (self.recompute, self.product))


def backward_tiles(capability: tuple[int, int], element_size: int, divisor: int) -> tuple[BackwardTiles, ...]:
    """The ways through the backward worth trying on a device; arguments as in `fused_tiles`."""
    return tuple(
        BackwardTiles(recompute=recompute, product=product)
        for recompute in (*fused_tiles(capability, element_size, divisor), None)
        for product in (product_tiles(element_size, divisor), None)
    )


# fp32 logits of one tile of the backward: 4096 positions by 4096 words. A product adds to fp32 results in memory once
# a tile, which at this size costs a fortieth of the time, by the rates of a 3090.
BACKWARD_BYTES = 64 * MIB


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The memory of the backward beside its results, in bytes of each part."""

    rows: int  # positions of one tile
    columns: int  # its vocabulary rows
    logits: int
    gradient: int  # of the logits, in the inputs' dtype; fp32 takes the logits' own memory
    total: int  # the hidden states' gradients of one tile in fp32
    product: int  # what cuBLAS multiplies before it is added; fp32 is added in place

    @property
    def bytes(self) -> int:
        """All parts, one after the other."""
        return self.logits + self.gradient + self.total + self.product


def padded(columns: int) -> int:
    """The next multiple of 16: a row of a tile starts where kernels and cuBLAS load fast."""
    return -(-columns // 16) * 16


def backward_workspace(count: int, width: int, vocabulary: int, element_size: int) -> Workspace:
    """What the CUDA backward needs for N positions, H and V; element_size is 2 or 4 bytes."""
    rows, columns = tiled_shape(count, vocabulary, BACKWARD_BYTES)
    elements, half = rows * padded(columns), element_size == 2
    parts = {
        "logits": 4 * elements,
        "gradient": 2 * elements if half else 0,
        "total": 4 * rows * width,
        "product": 4 * max(rows, columns) * width if half else 0,
    }
    # each part starts at a multiple of 256 bytes, as memory of its own would
    return Workspace(rows=rows, columns=columns, **{name: -(-size // 256) * 256 for name, size in parts.items()})


# The optimizer's step: adamw8bit.py.


@dataclass(frozen=True, kw_only=True)
class Adamw8bitBlocks:
    """The configuration of the 8-bit AdamW kernel."""

    rows: int = 4  # blocks of 256 weights of a program: one a warp, whose maximum needs no shared memory
    warps: int = 4

    @property
    def name(self) -> str:
        """The configuration in one word."""
        return f"{self.rows}x256/w{self.warps}"

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {"ROWS": self.rows}

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's launch options; a fused multiply-add rounds once where the twin on the CPU rounds twice."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}


ADAMW8BIT = Adamw8bitBlocks()
