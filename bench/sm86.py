"""The 3090 gate: every kernel configuration that may run on sm_86, compiled ahead of time on a machine without a GPU.

Each is compiled by Triton's own ptxas for sm_86 and for sm_90, and the machine code is disassembled: registers, local
memory (spills) and tensor-core instructions are what the device would run, not what PTX or the compiler's log promises.
A kernel fails the gate where a block needs more shared memory than the device has, where a loop touches spilled
registers, or where 16-bit products don't reach the tensor cores.

    python bench/sm86.py                         the gate: a table, then a line of JSON; exit code 1 if a kernel fails
    python bench/sm86.py --tiles 128 256 32 8 3  the same for other block sizes of the fused head in bf16, forward and
                                                 backward (BLOCK_N, BLOCK_V, BLOCK_H, warps, stages), before launch.py
                                                 names them
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

# Triton reads this when a kernel is decorated: what it interprets it cannot compile.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from machine_code import MachineCode, disassembled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slmfast.kernels import adamw8bit, linear_logprob, tiled_backward, tiled_logprob
from slmfast.kernels.launch import ADAMW8BIT, FOLD, GRADIENT, LIMITS, FusedTiles, fused_tiles, product_tiles

TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
# H decides on a mask along it and on wide loads: a multiple of every BLOCK_H, as published models have, a multiple of
# 16 alone, and neither.
WIDTHS = {896: "", 912: " masked H", 900: " unaligned H"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One kernel as it may be launched."""

    name: str
    config: str
    function: Any  # the decorated kernel
    arguments: dict[str, str]  # Triton's type of each argument that is no compile-time constant
    unaligned: set[str]  # integers among them that 16 need not divide
    constants: dict[str, Any]
    options: dict[str, int]
    tensor_cores: bool  # whether its products belong there


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a configuration needs on one target; `spills` counts the loads and stores of local memory."""

    name: str
    config: str
    target: str
    registers: int
    spills: int
    shared: int
    mma: int


def configurations(capability: int, tiles: tuple[FusedTiles, ...] | None = None) -> Iterator[Configuration]:
    """Yields every configuration that a launcher may choose on a target; with `tiles`, the bf16 head in those alone.

    What may run on sm_86 may run on sm_90 too, where there are larger tiles beside it.
    """
    for dtype, size in TYPES.items() if tiles is None else [("bf16", 2)]:
        for width in WIDTHS:
            for blocks in tiles or fused_tiles(divmod(capability, 10), size, width):
                for entropy in (False, True):
                    yield _fused(dtype, blocks, entropy, width)
                yield _recompute(dtype, blocks, width)
            for transposed in (False, True) if tiles is None else ():
                for odd in (False, True):
                    yield _product(dtype, transposed, odd, width)
        if tiles is None:
            yield _gradient(dtype)
    for entropy in (False, True) if tiles is None else ():
        yield _fold(entropy)
    for compensated in (False, True) if tiles is None else ():
        yield from (_adamw8bit(compensated, aligned) for aligned in (True, False))


def _fused(dtype: str, blocks: FusedTiles, entropy: bool, width: int) -> Configuration:
    pointers = {"hidden_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    results = ("maximum_ptr", "total_ptr", "weighted_ptr", "picked_ptr")
    return Configuration(
        name="linear_logprob",
        config=f"{dtype} {blocks.name}{' entropy' * entropy}{WIDTHS[width]}",
        function=linear_logprob._stretch_kernel,
        arguments=pointers
        | dict.fromkeys(results, "*fp32")
        | dict.fromkeys(("N", "V", "H", "stride_hidden", "stride_weight"), "i32"),
        unaligned={"N", "V"} | (set() if width % 16 == 0 else {"H", "stride_hidden", "stride_weight"}),
        constants={"ENTROPY": entropy, "EVEN_H": width % blocks.block_h == 0, "PRECISION": "ieee"} | blocks.constants,
        options=blocks.options,
        tensor_cores=TYPES[dtype] == 2,
    )


def _recompute(dtype: str, blocks: FusedTiles, width: int) -> Configuration:
    strides = ("stride_hidden", "stride_weight", "stride_gradient")
    return Configuration(
        name="recompute_gradient",
        config=f"{dtype} {blocks.name}{WIDTHS[width]}",
        function=tiled_backward._recompute_kernel,
        arguments=dict.fromkeys(("hidden_ptr", "weight_ptr", "gradient_ptr"), f"*{dtype}")
        | {"targets_ptr": "*i64", "log_sum_exp_ptr": "*fp32", "grad_ptr": "*fp32"}
        | dict.fromkeys(("N", "T", "H", "begin", *strides), "i32"),
        unaligned={"N", "T", "begin"} | (set() if width % 16 == 0 else {"H", "stride_hidden", "stride_weight"}),
        constants={"EVEN_H": width % blocks.block_h == 0, "PRECISION": "ieee"}
        | {name: size for name, size in blocks.constants.items() if name != "STRETCH"},
        options=blocks.options,
        tensor_cores=TYPES[dtype] == 2,
    )


def _product(dtype: str, transposed: bool, odd: bool, width: int) -> Configuration:
    """grad_hidden, or grad_weight where transposed; `odd` where 16 does not divide the tile's words."""
    blocks = product_tiles(TYPES[dtype], width)
    words = {"M" if transposed else "J"} if odd else set()
    return Configuration(
        name="grad_weight" if transposed else "grad_hidden",
        config=f"{dtype} {blocks.name}{WIDTHS[width]}{' odd vocabulary' * odd}",
        function=tiled_backward._product_kernel,
        arguments={"total_ptr": "*fp32", "a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "factor_ptr": "*fp32"}
        | dict.fromkeys(("M", "J", "K", "stride_total", "stride_a", "stride_b"), "i32"),
        unaligned={"J" if transposed else "M"}
        | words
        | (set() if width % 16 == 0 else {"K", "stride_total", "stride_b"}),
        constants={"TRANSPOSED": transposed, "PRECISION": "ieee"} | blocks.constants,
        options=blocks.options,
        tensor_cores=TYPES[dtype] == 2,
    )


def _gradient(dtype: str) -> Configuration:
    return Configuration(
        name="gradient_of_logits",
        config=f"{dtype} {GRADIENT.name}",
        function=tiled_backward._gradient_kernel,
        arguments={"logits_ptr": "*fp32", "targets_ptr": "*i64", "log_sum_exp_ptr": "*fp32", "grad_ptr": "*fp32"}
        | {"gradient_ptr": f"*{dtype}"}
        | dict.fromkeys(("N", "T", "begin", "stride"), "i32"),
        unaligned={"N", "begin"},
        constants=GRADIENT.constants,
        options=GRADIENT.options,
        tensor_cores=False,
    )


def _fold(entropy: bool) -> Configuration:
    state = ("maximum_ptr", "total_ptr", "weighted_ptr", "picked_ptr")
    return Configuration(
        name="fold_logits",
        config=FOLD.name + " entropy" * entropy,
        function=tiled_logprob._fold_kernel,
        arguments={"logits_ptr": "*fp32", "targets_ptr": "*i64"}
        | dict.fromkeys(state, "*fp32")
        | dict.fromkeys(("N", "T", "begin"), "i32"),
        unaligned={"N", "begin"},
        constants={"ENTROPY": entropy} | FOLD.constants,
        options=FOLD.options,
        tensor_cores=False,
    )


def _adamw8bit(compensated: bool, aligned: bool) -> Configuration:
    kinds = {"high": "i16", "low": "i16", "gradient": "fp32", "first": "u8", "second": "u8", "slots": "i32"}
    kinds |= {"first_scale": "fp32", "second_scale": "fp32", "lowest": "i16"}
    for moment in ("first", "second"):
        kinds |= {f"{moment}_values": "fp32", f"{moment}_edges": "fp32", f"{moment}_cells": "u8"}
    numbers = ("beta1", "rest1", "beta2", "rest2", "size", "inverse_root", "epsilon")
    return Configuration(
        name="adamw8bit",
        config=ADAMW8BIT.name + " compensated" * compensated + " unaligned N" * (not aligned),
        function=adamw8bit._step_kernel,
        arguments={f"{name}_ptr": f"*{kind}" for name, kind in kinds.items()}
        | dict.fromkeys(("N", "B", "number"), "i32")
        | dict.fromkeys(numbers, "fp32"),
        unaligned={"B", "number", *numbers} | ({"N"} if not aligned else set()),
        constants={"COMPENSATED": compensated, "WIDTH": 256} | ADAMW8BIT.constants,
        options=ADAMW8BIT.options,
        tensor_cores=False,
    )


def compiled(configuration: Configuration, capability: int) -> tuple[Row, MachineCode]:
    """Compiles for one target, with what a launch tells Triton: which pointers and integers 16 divides."""
    signature = configuration.arguments | dict.fromkeys(configuration.constants, "constexpr")
    # Triton wants a kernel's arguments in its own order.
    signature = {name: signature[name] for name in configuration.function.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in configuration.unaligned
    }
    source = ASTSource(configuration.function, signature, configuration.constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=configuration.options)
    code = disassembled(kernel.asm["cubin"])
    row = Row(
        name=configuration.name,
        config=configuration.config,
        target=f"sm_{capability}",
        registers=code.registers,
        spills=code.spills,
        shared=kernel.metadata.shared,
        mma=code.tensor_core_instructions,
    )
    return row, code


def faults(row: Row, spills_in_loops: int, tensor_cores: bool) -> list[str]:
    """Why a kernel may not ship for its target; nothing if it may."""
    limit = LIMITS[int(row.target.removeprefix("sm_"))]
    found = []
    if row.shared > limit.shared:
        found.append(f"{row.shared} bytes of shared memory a block, the device has {limit.shared}: smaller tiles")
    if spills_in_loops:
        found.append(f"{spills_in_loops} loads and stores of spilled registers in a loop: smaller tiles or more warps")
    if row.registers > limit.registers:
        found.append(f"{row.registers} registers a thread, the device has {limit.registers}: more warps")
    if tensor_cores and not row.mma:
        found.append("no tensor-core instruction, though its products are 16-bit: tiles of 16 and more each way")
    return found


def table(rows: list[Row]) -> str:
    """The rows in columns."""
    heads = list(asdict(rows[0]))
    cells = [heads, *([str(value) for value in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main(arguments: list[str] | None = None) -> int:
    """Runs the gate; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", nargs=5, type=int, metavar=("N", "V", "H", "WARPS", "STAGES"))
    asked = parser.parse_args(arguments).tiles
    tiles = None
    if asked:
        names = ("block_n", "block_v", "block_h", "warps", "stages")
        tiles = (FusedTiles(**dict(zip(names, asked, strict=True))),)
    rows, failures = [], []
    for capability in LIMITS:
        for configuration in configurations(capability, tiles):
            row, code = compiled(configuration, capability)
            rows.append(row)
            for fault in faults(row, code.spills_in_loops, configuration.tensor_cores):
                failures.append(f"{row.name} [{row.config}] on {row.target}: {fault}")
    print(table(rows))
    for failure in failures:
        print(f"FAILS: {failure}")
    print(json.dumps({"kernels": [asdict(row) for row in rows]}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
