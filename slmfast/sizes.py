"""Amounts of memory as people write them."""

import re
from typing import Any

from slmfast.errors import UserError

GIB = 1 << 30
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{binary}B": base**power
    for binary, base in (("i", 1024), ("", 1000))
    for power, letter in enumerate("KMGT", start=1)
}
_UNITS_BY_CASE = {unit.upper(): size for unit, size in _UNITS.items()}


def parse_bytes(size: Any, key: str = "budget") -> int:
    """Bytes from "24GiB", "24 GB", "512MiB" or a whole number of bytes.

    Raises:
        UserError: it is none of these, not above 0, or without a unit less than a mebibyte; `key` names it.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        number, unit = str(size), ""
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
        number, unit = match.groups() if match else ("", "")
    # A small number without a unit is meant as something else than bytes.
    least = 1 if unit else 1 << 20
    if not number or unit.upper() not in _UNITS_BY_CASE or (found := _bytes(number, unit)) < least:
        raise UserError(f"{key} is {size!r}: give an amount of memory such as 24GiB")
    return found


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS_BY_CASE[unit.upper()])


def gib(size: int) -> str:
    """An amount of memory to two decimals."""
    return f"{size / GIB:.2f} GiB"
