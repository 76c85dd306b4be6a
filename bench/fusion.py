"""The average of models beside what the disk alone takes: one command, one table, one line of JSON.

    slmfast bench fusion                    three random models of Qwen2-0.5B's shape, 2 GB each, made and removed
    slmfast bench fusion --scale 0.1        the same with a tenth of the vocabulary and of the layers

The peer is a plain copy: it reads the weights of all models, writes as many bytes as one has, and waits until the disk
has them, as we do. So its time is the floor, and the ratio says how many times that floor ours takes. Runs of both
sides alternate, each in a process of its own; the time is that of the work without the start, the best of a few.
Before every run the last output is gone and the disk has all that was written; in the case `cached` all weights lie in
memory, in `disk` none does. The average must be the same bits as numpy's over the whole files.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder, which is in no package

import numpy as np
import torch
from case_runner import Notes, run_bench
from own_child import measured
from result_table import Result

from slmfast.errors import UserError
from slmfast.model_folder import SINGLE, write_tensors

CHILD = Path(__file__).parent / "fusion_child.py"
WEIGHTS = (0.5, 0.3, 0.2)
LAYERS, VOCABULARY, HIDDEN, KEYS, MLP = 24, 151936, 896, 128, 4864  # Qwen2-0.5B
CHUNK = 1 << 24  # weights that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Context(Notes):
    """Where the models lie, and how often each side runs."""

    folder: Path
    runs: int
    threads: int

    @property
    def models(self) -> list[Path]:
        """The folders of the models."""
        return [self.folder / f"model-{number}" for number in range(len(WEIGHTS))]

    @property
    def output(self) -> Path:
        """Where either side writes."""
        return self.folder / "output"


def shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the model's tensors, with a share of its layers and vocabulary."""
    block = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, MLP),
        "mlp.gate_proj.weight": (MLP, HIDDEN),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.bias": (KEYS,),
        "self_attn.k_proj.weight": (KEYS, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.bias": (KEYS,),
        "self_attn.v_proj.weight": (KEYS, HIDDEN),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (max(1, round(VOCABULARY * scale)), HIDDEN)}
    for layer in range(max(1, round(LAYERS * scale))):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return dict(sorted((found | {"model.norm.weight": (HIDDEN,)}).items()))


def make_models(context: Context, scale: float) -> int:
    """Writes the random models; gives the bytes of one's weights."""
    for number, folder in enumerate(context.models):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}", encoding="utf-8")
        draw = torch.Generator().manual_seed(number)
        layout = shapes(scale)
        values = (torch.empty(shape).normal_(0, 0.02, generator=draw) for shape in layout.values())
        write_tensors(folder / SINGLE, layout, torch.float32, values)
    return (context.models[0] / SINGLE).stat().st_size


def _weights(context: Context) -> list[Path]:
    return [model / SINGLE for model in context.models]


def _cached(context: Context) -> None:
    buffer = bytearray(1 << 20)
    for path in _weights(context):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _on_disk(context: Context) -> None:
    for path in _weights(context):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure(context: Context, side: str, prepare: Callable[[Context], None]) -> dict[str, float]:
    shutil.rmtree(context.output, ignore_errors=True)
    os.sync()
    prepare(context)
    weights = [f"{path}={weight}" for path, weight in zip(context.models, WEIGHTS, strict=True)]
    return measured(side, context.threads, context.output, *weights, script=CHILD)


def same_bits(context: Context) -> bool:
    """Whether the output is the average of the models; all files have the same header, the output's as well."""
    paths = [*_weights(context), context.output / SINGLE]
    with paths[0].open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    *parts, found = (np.memmap(path, dtype=np.float32, mode="r", offset=start) for path in paths)
    for begin in range(0, len(found), CHUNK):
        end = begin + CHUNK
        expected = sum(part[begin:end].astype(np.float64) * weight for part, weight in zip(parts, WEIGHTS, strict=True))
        if not np.array_equal(found[begin:end], expected.astype(np.float32)):
            return False
    return True


def _case(name: str, prepare: Callable[[Context], None]) -> Callable[[Context], Iterator[Result]]:
    def case(context: Context) -> Iterator[Result]:
        ours, theirs = [], []
        for run in range(context.runs):
            theirs.append(_measure(context, "copy", prepare)["seconds"])
            ours.append(_measure(context, "fuse", prepare))
            context.say(f"{name}, run {run + 1}: fused in {ours[-1]['seconds']:.2f} s, copied in {theirs[-1]:.2f} s")
        same = same_bits(context)
        best = min(run["seconds"] for run in ours)
        size = (context.models[0] / SINGLE).stat().st_size / 1e9
        yield Result(
            group="fusion",
            case=f"{len(WEIGHTS)} models of {size:.3g} GB, {name}, best of {context.runs}",
            peer="plain copy: as many bytes read and written",
            ours=best,
            theirs=min(theirs),
            unit="s",
            ratio=best / min(theirs) if same else None,
            ratio_says="its time",
            same_answer=same,
        )
        peak = max(run["peak_bytes"] for run in ours) / 1e6
        yield Result(group="fusion", case=f"peak memory of the process, {name}", ours=peak, unit="MB")

    return case


CASES = {"cached": _case("cached", _cached), "disk": _case("disk", _on_disk)}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="slmfast bench fusion", description=__doc__.partition("\n")[0])
    options.add_argument("--case", action="append", choices=CASES, help="a case (may be repeated; default: all)")
    options.add_argument("--scale", type=float, default=1.0, help="share of the layers and the vocabulary (default 1)")
    options.add_argument("--runs", type=int, default=3, help="runs of each side (default 3)")
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="our threads")
    options.add_argument("--folder", type=Path, help="where the models go (default: the temporary folder)")
    options.add_argument("--out", type=Path, help="a file for the line of JSON")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if an average was not what it should be, or if our own side failed.

    Raises:
        UserError: an option is out of range, or the disk has no room.
    """
    options = parser().parse_args(argv)
    if options.threads < 1 or options.runs < 1 or not 0 < options.scale <= 1:
        raise UserError("--threads and --runs must be above 0, --scale above 0 and at most 1")
    needed = (len(WEIGHTS) + 1) * 4 * sum(torch.Size(shape).numel() for shape in shapes(options.scale).values())
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        if shutil.disk_usage(scratch).free < 1.1 * needed:
            raise UserError(f"{scratch} has no room for {needed / 1e9:.1f} GB: give another place with --folder")
        context = Context(folder=Path(scratch), runs=options.runs, threads=options.threads)
        make_models(context, options.scale)
        return run_bench("fusion", CASES, context, options)


if __name__ == "__main__":
    from slmfast.cli import main as command_line

    raise SystemExit(command_line(["bench", "fusion", *sys.argv[1:]]))  # user errors become one line there
