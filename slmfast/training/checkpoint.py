"""Exact checkpoints, in safetensors and JSON: what is loaded is bit for bit what was saved.

A checkpoint is a folder `checkpoint-N` that appears by one rename when all of it is on the disk, and carries the hash
of each of its files. What is half-written or damaged is never resumed from.
"""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slmfast.errors import UserError
from slmfast.model_folder import write_typed_tensors
from slmfast.store import atomic_path, file_digest, read_json, remove, write_json

WEIGHTS = "weights.safetensors"
OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_VALUES = "optimizer.json"
SCHEDULER = "scheduler.json"
TRAINER_STATE = "trainer_state.json"  # the name under which transformers looks for it
COMPLETE = "complete.json"  # the completion mark: the hashes of all other files


def save(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, write_state: Callable[[str], None]) -> None:
    """Writes one checkpoint; the folder is there when it returns, and not before all of it is.

    Args:
        write_state: writes the trainer's state in JSON to the path it is given.
    """
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for number, entry in state["state"].items():
        for key, value in _flat(entry):
            (tensors if isinstance(value, Tensor) else values)[f"{number}.{key}"] = value
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        _write(temporary / WEIGHTS, _trained(model))
        _write(temporary / OPTIMIZER_TENSORS, tensors)
        write_json(temporary / OPTIMIZER_VALUES, {"values": values, "param_groups": state["param_groups"]})
        write_json(temporary / SCHEDULER, scheduler.state_dict())
        write_state(str(temporary / TRAINER_STATE))
        write_json(temporary / COMPLETE, {file.name: file_digest(file) for file in sorted(temporary.iterdir())})


def _flat(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The items of one parameter's state; bitsandbytes wraps its own in a dictionary, and loads them bare as well."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copies a checkpoint's weights into the model's own memory."""
    with safe_open(folder / WEIGHTS, framework="pt") as file, torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(file.get_tensor(name))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: with LoRA the adapters alone, else all parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Restores the optimizer's and the schedule's state."""
    saved = read_json(folder / OPTIMIZER_VALUES)
    state: dict[int, dict[str, Any]] = {}
    for key, value in saved["values"].items():
        _place(state, key, value)
    with safe_open(folder / OPTIMIZER_TENSORS, framework="pt") as file:
        for key in file.keys():
            # Cloned: tensors in a mapped file lie at other alignments than fresh ones.
            _place(state, key, file.get_tensor(key).clone())
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    scheduler.load_state_dict(read_json(folder / SCHEDULER))


def _place(state: dict[int, dict[str, Any]], key: str, value: Any) -> None:
    number, name = key.split(".", 1)
    state.setdefault(int(number), {})[name] = value


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())}
    write_typed_tensors(path, layout, (tensors[name] for name in layout))


def latest(work: Path) -> Path | None:
    """The newest whole checkpoint below `work`; damaged ones are named on stderr, removed and passed over."""
    for folder in sorted(folders(work), key=_number, reverse=True):
        fault = _fault(folder)
        if fault is None:
            return folder
        print(f"train: {folder} is damaged ({fault}): going on from the checkpoint before it", file=sys.stderr)
        remove(folder)
    return None


def prune(work: Path, keep: int) -> None:
    """Removes all checkpoints below `work` but the newest `keep`."""
    for folder in sorted(folders(work), key=_number, reverse=True)[keep:]:
        remove(folder)


def folders(work: Path) -> list[Path]:
    """All checkpoints below `work`, whole or not, in no order."""
    return [path for path in work.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def steps_done(work: Path) -> int:
    """The steps of the newest checkpoint below `work`, whole or not; 0 without one."""
    return max(map(_number, folders(work)), default=0)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = read_json(folder / COMPLETE)
    except (OSError, UserError) as error:
        return f"no {COMPLETE}: {error}" if isinstance(error, OSError) else f"{COMPLETE} can't be read"
    for name, hash_ in expected.items():
        if not (folder / name).is_file() or file_digest(folder / name) != hash_:
            return f"{name} is not as it was written"
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small safetensors file, in memory of their own."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key).clone() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error
