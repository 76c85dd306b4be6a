"""A model folder: its weights by name, read one at a time, and everything that makes it complete beside them.

Weights are safetensors alone, one file or several with an index; pickled ones are not read. The writer streams: it
never holds more than one tensor, and its bytes depend on the names, shapes and values alone (a file that carries more
metadata than `format` would be written in random order).
"""

import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slmfast.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"
TIED_EMBEDDING = "model.embed_tokens.weight"
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".py", ".md", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED_NAMES = {
    "config.json",
    "training.json",
    "training_log.json",
    "fusion.json",
    "fusion_search.json",
    "scores.json",
}

# The safetensors format's names of the element types that are written here.
TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}
_TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
_ELSEWHERE = "choose another output folder"


def check_model_folder(path: Path) -> Path:
    """The folder itself; a UserError where it is no model folder with safetensors."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no model folder (no config.json): give the folder of a saved model")
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        raise UserError(f"{path} holds no {SINGLE}: save the model as safetensors")
    return path


class ModelWeights:
    """The tensors of a model folder, opened lazily; use it as a context manager.

    The head of a model with tied embeddings is the embedding: a second copy of it in the file is not a name here.
    """

    def __init__(self, path: Path):
        self.path = check_model_folder(path)
        self._open: dict[Path, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._files = self._named_files()
        if read_config(path).get("tie_word_embeddings") and TIED_EMBEDDING in self._files:
            self._files.pop(TIED_HEAD, None)
        held = {file: set(self._handle(file).keys()) for file in dict.fromkeys(self._files.values())}
        for name, file in self._files.items():
            if name not in held[file]:
                raise UserError(f"{file} has no tensor {name} though {INDEX} names it: fetch the whole model")

    def _named_files(self) -> dict[str, Path]:
        """The file that holds each tensor: the only one, or as the index says."""
        single, index = self.path / SINGLE, self.path / INDEX
        if single.is_file():
            return dict.fromkeys(self._handle(single).keys(), single)
        named = _read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
            raise UserError(f"{index} has no weight_map: fetch or save the model again")
        files = {name: self.path / file for name, file in sorted(named.items())}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise UserError(f"{file} is missing though {INDEX} names it: fetch the whole model")
        return files

    def _handle(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} can't be read as safetensors ({error}): fetch or save it again") from error
        return self._open[file]

    @property
    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._handle(self._files[name]).get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._handle(self._files[name]).get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type, from the file's header."""
        stored = self._entry(name)["dtype"]
        if stored not in _TYPES:
            raise UserError(
                f"tensor {name} of {self.path} is stored as {stored}: save the model as float32 or bfloat16"
            )
        return _TYPES[stored]

    def read_piece(self, name: str, start: int, out: Tensor) -> None:
        """Reads as many elements as `out` has, from number `start` on, into it: a vector of the tensor's own type.

        Unlike `[name]` it leaves nothing in memory, and many threads may do it at once.
        """
        file = self._files[name]
        begin = self._data_start(file) + self._entry(name)["data_offsets"][0] + start * out.element_size()
        target = memoryview(out.view(torch.uint8).numpy())
        while target:
            count = os.preadv(self._descriptor(file), [target], begin)
            if count == 0:
                raise UserError(f"{file} ends within tensor {name}: fetch or save it again")
            target, begin = target[count:], begin + count

    def _entry(self, name: str) -> dict[str, Any]:
        return self._header(self._files[name])[1][name]

    def _data_start(self, file: Path) -> int:
        return self._header(file)[0]

    def _header(self, file: Path) -> tuple[int, dict[str, Any]]:
        """Where a file's data begins, and its header; the library has found the file sound before."""
        if file not in self._headers:
            self._handle(file)
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                self._headers[file] = 8 + length, json.loads(opened.read(length))
        return self._headers[file]

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def __enter__(self) -> "ModelWeights":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def check_same_tensors(first: ModelWeights, other: ModelWeights) -> None:
    """A UserError that names the first tensor by whose name or shape two models differ."""
    for name in sorted(set(first.names) ^ set(other.names)):
        owner, lacking = (first, other) if name in first.names else (other, first)
        raise UserError(f"{lacking.path} has no tensor {name}, which {owner.path} has: take models of one architecture")
    for name in first.names:
        if first.shape(name) != other.shape(name):
            raise UserError(
                f"tensor {name} is {list(first.shape(name))} in {first.path} and {list(other.shape(name))} in "
                f"{other.path}: take models of one architecture"
            )


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[Tensor]):
    """Writes one safetensors file of `dtype`, a tensor at a time, in the order of `shapes`."""
    write_typed_tensors(path, {name: (dtype, tuple(shape)) for name, shape in shapes.items()}, tensors)


def write_typed_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[Tensor]
) -> None:
    """Writes one safetensors file whose tensors have the given types and shapes, in the order of `layout`.

    The format: the header's length as a little-endian u64, the header in JSON padded with spaces to 8 bytes, the data.
    """
    with path.open("wb") as file:
        file.write(_header_bytes(layout)[0])
        for (name, (dtype, shape)), tensor in zip(layout.items(), tensors, strict=True):
            if tensor.shape != torch.Size(shape):
                raise ValueError(f"tensor {name} is {tuple(tensor.shape)}, its header says {tuple(shape)}")
            data = tensor.detach().to("cpu", dtype).contiguous()
            file.write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))


def write_header(path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """Begins a file of `write_typed_tensors` whose data somebody else writes, and says where each tensor starts."""
    header, places, size = _header_bytes(layout)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    return {name: len(header) + place for name, place in places.items()}


def _header_bytes(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int], int]:
    """A file's bytes before its data, where each tensor starts in the data, and the data's size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, offset = {}, 0
    for name, (dtype, shape) in layout.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        places[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places, offset


def write_companions(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Makes `target` a complete model folder but for its weights: what lies beside those of `source`.

    Copies tokenizer, chat template and generation config, writes config.json with the new `dtype`, and makes a
    generation config of the config's token ids where there is none.
    """
    for file in sorted(source.iterdir()):
        copied = file.is_file() and not file.name.endswith(NOT_COPIED) and file.name not in NOT_COPIED_NAMES
        if copied and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    config = read_config(source)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(target / "config.json", config)
    if not (target / "generation_config.json").exists():
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
        _write_json(target / "generation_config.json", {"_from_model_config": True, **ids})


def check_output(output: Path, card: str, inputs: Iterable[Path]) -> None:
    """Refuses to put a model where it would replace anything but an earlier result of its kind, or change an input.

    Args:
        card: the file that marks such a result.
    """
    place = output.resolve()
    for path in inputs:
        other = Path(path).resolve()
        if place == other:
            raise UserError(f"{output} is also an input: {_ELSEWHERE}")
        if place in other.parents or other in place.parents:
            how = "holds" if place in other.parents else "lies in"
            raise UserError(f"{output} {how} the input {path}: {_ELSEWHERE}")
    if output.exists() and not (output.is_dir() and ((output / card).is_file() or not any(_entries(output)))):
        raise UserError(f"{output} exists and holds no {card} of an earlier run: {_ELSEWHERE}")


def _entries(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if entry.name != ".work")


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    return _read_object(path / "config.json")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): fetch or save the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: fetch or save the model again")
    return value


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")
