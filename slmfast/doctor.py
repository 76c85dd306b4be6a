"""What is active on this machine, and where something is not, why."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator

from slmfast.sandbox import why_no_sandbox

PACKAGES = ("torch", "transformers", "triton", "trl", "bitsandbytes", "lm-eval", "pyarrow", "numba", "datasets")
OPTIONAL = {
    "vllm": "engines of kind vllm need it; pip install vllm on a CUDA machine adds it",
    "flash-attn": "attention falls back to torch's own; pip install slmfast[cuda] on a CUDA machine adds it",
}


def findings(model: str | None = None) -> Iterator[tuple[str, str]]:
    """Yields (what, how it stands) pairs, one line each; with a model's folder or hub name also how it is scored."""
    import torch

    yield "python", platform.python_version()
    yield "processor", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    yield "native module", _native()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        yield "device", f"cuda: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.1f} GiB"
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        yield "device", f"cpu: torch sees no CUDA device (torch {torch.__version__} is {built})"
    yield "kernels", _kernels(torch.cuda.is_available())
    for name in PACKAGES:
        yield name, _version(name) or "missing: reinstall slmfast with its requirements"
    for name, otherwise in OPTIONAL.items():
        yield name, _version(name) or f"not installed: {otherwise}"
    yield "sandbox", _sandbox()
    if model is not None:
        yield "scoring", _scoring(model)


def _sandbox() -> str:
    why = why_no_sandbox()
    if why is None:
        return "bubblewrap: HumanEval runs generated programs in it, if asked to (evaluate.run_generated_code)"
    return f"none, so HumanEval is refused: {why}"


def _scoring(name: str) -> str:
    """How a model is scored; loads it and its tokenizer. Raises UserError where it cannot be."""
    from slmfast.errors import UserError
    from slmfast.scoring.head import head_weight
    from slmfast.scoring.loading import load_model, load_tokenizer
    from slmfast.scoring.packable import why_not_packed

    model = load_model(name)
    load_tokenizer(name)
    head_weight(model)
    for weight, value in model.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"{name}: weight {weight} holds NaN or infinity, and so would every score: save it anew")
    why = why_not_packed(model)
    if why is None:
        return f"{name}: in packs, prompts shared by their replies"
    return f"{name}: each prompt again with each reply, for {why}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> str:
    try:
        from slmfast import _native as native
    except ImportError as error:
        return f"missing ({error}): install the package with a C++17 compiler at hand"
    try:
        return f"built, instruction set {native.active_isa()} of {', '.join(native.available_isas())}"
    except ValueError as error:
        return f"built, but {error}"


def _kernels(cuda: bool) -> str:
    if not cuda:
        return "tiled torch kernels on the CPU: Triton kernels need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "tiled torch kernels: the package triton is missing"
    return "Triton"
