"""What a compiled kernel's machine code says of registers, spills and tensor cores, read from its disassembly."""

import re
import subprocess
import tempfile
from dataclasses import dataclass

from triton import knobs

# HMMA is the warp's product of Volta to Ada, HGMMA the warp group's of Hopper.
TENSOR_CORES = re.compile(r"\bH(?:G)?MMA\b")
# Local memory holds what did not fit into registers: a kernel that indexes no private array has no other use for it.
LOCAL_MEMORY = re.compile(r"\b(?:LDL|STL)\b")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\b.*?`\((\.L_x_\d+)\)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s")


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """Counts of one kernel."""

    registers: int  # of a thread
    instructions: int
    spills: int  # loads and stores of local memory
    spills_in_loops: int
    tensor_core_instructions: int


def disassembled(cubin: bytes) -> MachineCode:
    """The counts of a cubin that holds one kernel, through the nvdisasm and cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return counted(listing, usage)


def counted(listing: str, usage: str) -> MachineCode:
    """The counts of a listing of `nvdisasm -c` and the resources that `cuobjdump -res-usage` prints.

    Raises:
        ValueError: the tools print something else than this module can read.
    """
    lines = listing.splitlines()
    code = [bool(INSTRUCTION.match(line)) for line in lines]
    registers = re.search(r"\bREG:(\d+)", usage)
    if registers is None or not any(code):
        raise ValueError("nvdisasm and cuobjdump print no instructions or registers: another version than Triton's?")
    in_loop = _in_loops(lines)
    local = [here and bool(LOCAL_MEMORY.search(line)) for here, line in zip(code, lines, strict=True)]
    return MachineCode(
        registers=int(registers[1]),
        instructions=sum(code),
        spills=sum(local),
        spills_in_loops=sum(spill and loop for spill, loop in zip(local, in_loop, strict=True)),
        tensor_core_instructions=sum(
            here and bool(TENSOR_CORES.search(line)) for here, line in zip(code, lines, strict=True)
        ),
    )


def _in_loops(lines: list[str]) -> list[bool]:
    """Whether each line lies in a loop: between a label and a later branch back to it."""
    inside = [False] * len(lines)
    seen: dict[str, int] = {}
    for place, line in enumerate(lines):
        if label := LABEL.match(line):
            seen[label[1]] = place
        branch = BRANCH.search(line)
        if branch and branch[1] in seen:
            start = seen[branch[1]]
            inside[start : place + 1] = [True] * (place + 1 - start)
    return inside


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
