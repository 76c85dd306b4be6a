"""Compiles the Triton kernels ahead of time for sm_86 and sm_90, which needs no GPU; a test starts it.

Prints one JSON list: of each configuration its registers, spilled bytes, shared memory and tensor-core instructions.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slmfast.kernels import linear_logprob as fused

TYPES = {2: "bf16", 4: "fp32"}
INTEGERS = ("N", "V", "H", "stride_hidden", "stride_weight")


def compiled(capability, size):
    tiles = fused.TILES[size]
    constants = {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    constants |= {"STRETCH": fused.STRETCH, "PRECISION": "ieee"}
    signature = {
        "hidden_ptr": f"*{TYPES[size]}",
        "weight_ptr": f"*{TYPES[size]}",
        "targets_ptr": "*i64",
        **dict.fromkeys(("maximum_ptr", "total_ptr", "picked_ptr"), "*fp32"),
        **dict.fromkeys(INTEGERS, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    # what a launch finds for Qwen2's shapes: pointers and widths that 16 divides, and any number of positions
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name[0] not in "NVBSP"}
    options = {name: tiles[name] for name in ("num_warps", "num_stages")}
    source = ASTSource(fused._stretch_kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(kernel, capability):
    """ptxas's own account of registers and spills."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        name = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [str(ptxas), "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


def main():
    found = []
    for capability in (86, 90):
        for size in TYPES:
            kernel = compiled(capability, size)
            registers, spills = assembled(kernel, capability)
            mma = len(re.findall(r"\b(?:wg)?mma\.", kernel.asm["ptx"]))
            shared = kernel.metadata.shared
            row = {"target": capability, "dtype": TYPES[size], "registers": registers, "spills": spills}
            found.append(row | {"shared": shared, "mma": mma})
    print(json.dumps(found))


main()
