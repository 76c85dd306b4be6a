"""Models and tokenizers from a path, as scoring and generation need them; a user's mistake is one line."""

import re
import threading
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from slmfast.errors import UserError

ModelLike = nn.Module | str | Path
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making_a_lock = threading.Lock()


def check_model_name(name: str | Path) -> str:
    """The name as transformers takes it: an existing model folder, or a hub name "owner/model".

    Raises UserError for anything else.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json: give a complete model folder")
        return str(path)
    if not _HUB_NAME.fullmatch(str(name)):
        raise UserError(f"no model at {name}: give an existing model folder or a hub name (owner/model)")
    return str(name)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model folder or hub name. Raises UserError where there is none."""
    checked = check_model_name(name)
    folder = Path(checked)
    # From a folder without any of these transformers makes a tokenizer that knows no text.
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(f"{name} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}): add the model's tokenizer files")
    try:
        return AutoTokenizer.from_pretrained(checked, trust_remote_code=False)
    except (OSError, ValueError) as error:
        remedy = "add its tokenizer files" if folder.is_dir() else "check the name, and the way to the hub"
        if "config file" in str(error) and "JSON" in str(error):
            remedy = "mend its config.json"
        raise UserError(f"no tokenizer loads from {name} ({_first_line(error)}): {remedy}") from error


def load_model(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> nn.Module:
    """A causal language model in evaluation mode: fp32 on a CPU, bf16 on CUDA unless `dtype` says otherwise.

    Raises UserError where no model loads from `name`.
    """
    checked = check_model_name(name)
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                checked, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
        check_complete(name, info)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no model loads from {name} ({_first_line(error)}): give a complete model folder") from error
    if device.type == "cpu":
        # Loaded tensors lie as the file has them, and BLAS may choose its path by alignment: copies lie alike, always.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model.to(device).eval()


def check_complete(name: str | Path, info: dict[str, Any]) -> None:
    """Raises UserError where transformers has made up weights of a model that its files lack."""
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{name} lacks the weight {missing[0]}{more}: give a complete model folder")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; CUDA where there is one if none is named."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"device {device!r} is unknown: use cpu or cuda") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device}, but torch sees no CUDA device: use cpu, or see slmfast doctor")
    return found


def resolve_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, by object or by name; fp32 on a CPU and bf16 elsewhere if none is named."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UserError(f"dtype {dtype!r} is unknown: use float32, bfloat16 or float16")
    return resolved


def as_model(model: ModelLike, device: Any, dtype: Any) -> nn.Module:
    """A module as it is, a path loaded. Raises UserError where a module would have to be changed."""
    _check_kind(model)
    if not isinstance(model, nn.Module):
        return load_model(model, device=device, dtype=dtype)
    weight = next(model.parameters())
    if device is not None and resolve_device(device).type != weight.device.type:
        raise UserError(f"the module is on {weight.device}, not {device}: move it there, or pass its folder's path")
    if dtype is not None and resolve_dtype(dtype, weight.device) != weight.dtype:
        raise UserError(f"the module is {weight.dtype}, not {dtype}: convert it, or pass its folder's path")
    return model


def _check_kind(model: Any) -> None:
    if not isinstance(model, nn.Module | str | Path):
        raise UserError(f"model is a {type(model).__name__}: give a model, its folder's path or a hub name")


def as_tokenizer(tokenizer: Any, model: ModelLike) -> Any:
    """A tokenizer as it is, or loaded from a path; None takes the one in the model's folder."""
    if tokenizer is None:
        _check_kind(model)
        if isinstance(model, nn.Module):
            raise UserError("a module brings no tokenizer: pass one, or its folder's path")
        tokenizer = model
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def checked_window(model: nn.Module, window: int | None) -> int:
    """The window asked for, or that of the model where none is.

    Raises UserError where not even one token of context and one target fit, and where the model knows no such places.
    """
    if window is None:
        return config_window(model.config)
    if not isinstance(window, Integral) or window < 2:
        raise UserError(f"window is {window!r}: give at least 2 tokens")
    known = _positions(model.config)
    if known is not None and window > known:
        raise UserError(f"window is {window}, but {type(model).__name__} knows {known} positions: give at most these")
    return int(window)


def config_window(config: Any) -> int:
    """How many tokens a model of this configuration was made for."""
    window = _positions(config)
    if window is None:
        raise UserError(f"{type(config).__name__} states no max_position_embeddings: pass window=")
    return window


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode and no gradients inside; the module's own mode comes back after.

    In its own dtype too, whatever autocast there is around: a score is that of the weights as they are. One thread at a
    time: what is done inside changes the module's mode, its attention and its layers' forwards, and
    another thread that used it meanwhile would get wrong scores without an error.
    """
    with _lock(model):
        training = model.training
        model.eval()
        try:
            # no_grad, not inference_mode: a buffer that a module renews inside must still serve in training.
            with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
                yield
        finally:
            model.train(training)


def _lock(model: nn.Module) -> threading.RLock:
    with _making_a_lock:
        return _locks.setdefault(model, threading.RLock())


@contextmanager
def _quiet():
    """Keeps transformers' bars off the user's screen inside: a stage shows a progress of its own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
