"""Which of several kernels is the fastest for a shape: measured once, then remembered in the process and in a file.

Kernels round differently. A choice that is remembered gives a second run the same kernel, and so the same bytes.
"""

import fcntl
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

_chosen: dict[tuple[Path, str], str] = {}


def cache_file() -> Path:
    """Where choices are kept: fastest.json in slmfast's folder of the user's cache (XDG Base Directory)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "slmfast" / "fastest.json"


def bucket(count: int) -> int:
    """The next power of two: shapes of one bucket share a choice."""
    return 1 << max(0, count - 1).bit_length()


def fastest(
    key: str,
    candidates: Mapping[str, Callable[[], object]],
    timer: Callable[[Callable[[], object]], float],
    path: Path | None = None,
) -> str:
    """The name of the fastest candidate for `key`, by measurement if none is remembered.

    A file that is damaged, or that names a kernel which is no candidate any more, is measured anew and mended.

    Args:
        key: the device, versions, dtype and shape that the choice holds for.
        candidates: by name, what computes the result.
        timer: gives the time of one call of a candidate, in any unit.
        path: the file of choices, `cache_file()` by default.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    path = path or cache_file()
    known = _chosen.get((path, key))
    if known in candidates:
        return known
    try:
        known = _read(path).get(key)
        if known not in candidates:
            known = _remember(path, key, _measured(candidates, timer), candidates)
    except OSError as error:
        warnings.warn(f"{path} keeps no choice of kernel, so the next run may take another: {error}", stacklevel=2)
        known = _measured(candidates, timer)
    _chosen[path, key] = known
    return known


def _measured(candidates: Mapping[str, Callable[[], object]], timer: Callable[[Callable[[], object]], float]) -> str:
    times = {name: timer(candidate) for name, candidate in candidates.items()}
    return min(times, key=times.__getitem__)


def _read(path: Path) -> dict[str, str]:
    """The choices in a file; none where it is missing or damaged, since measuring anew mends both."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(held, dict):
        return {}
    return {key: name for key, name in held.items() if isinstance(name, str)}


def _remember(path: Path, key: str, name: str, candidates: Mapping[str, object]) -> str:
    """Adds a choice to the file and returns it, or the one that another process has written there meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held = _read(path)
        if held.get(key) in candidates:
            return held[key]
        text = json.dumps(held | {key: name}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text + "\n")
        Path(file.name).replace(path)
    return name
