"""The cases whose memory is taken: each side in a process of its own. The head alone, and whole replies."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from own_child import ChildFailed, measured
from result_table import Result
from scoring_context import Context, best_batch
from scoring_gate import same_answer
from scoring_heads import HEADS, PEERS
from scoring_methods import METHODS
from scoring_texts import LONG

CHILD = Path(__file__).parent / "scoring_child.py"
MEGABYTE = 1e6


def _ask(context: Context, **request: Any) -> tuple[float, float, np.ndarray | None]:
    """(seconds, megabytes beyond what was held, the answer) of a process that runs the request.

    Raises:
        ChildFailed: it ended with an error, or was killed for its memory.
    """
    common = {"device": str(context.device), "dtype": str(context.dtype).removeprefix("torch.")}
    common |= {"threads": context.threads, "seed": context.seed}
    with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
        path, output = Path(scratch) / "request.json", Path(scratch) / "answer.npy"
        path.write_text(json.dumps(common | request | {"output": str(output)}), encoding="utf-8")
        environment = {"OMP_NUM_THREADS": str(context.threads)}
        found = measured(path, environment=environment, script=CHILD)
        answer = np.load(output) if output.exists() else None
    return found["seconds"], found["bytes"] / MEGABYTE, answer


def head_case(context: Context) -> Iterator[Result]:
    """Our head beside full logits and the peers' heads: seconds, and memory beyond the inputs."""
    config = context.config.get_text_config()
    shape = {"positions": context.sizes.positions, "width": config.hidden_size, "vocabulary": config.vocab_size}
    what = "head, N={positions:,}, H={width:,}, V={vocabulary:,}".format(**shape)

    def ask(name: str) -> tuple[float, float, np.ndarray | None]:
        context.say(f"{what}: {HEADS[name].title}")
        return _ask(context, task="head", method=name, **shape)

    seconds, memory, ours = ask("ours")
    low = context.dtype.itemsize < 4
    truth = ask("truth")[2] if low else None
    for name in PEERS:
        peer = HEADS[name]
        if peer.cuda_only and context.device.type != "cuda":
            context.fail(f"{peer.title}, head", "it runs on CUDA only", ours=False)
            continue
        if peer.version() is None:
            context.fail(f"{peer.title}, head", f"not installed: pip install {peer.package}", ours=False)
            continue
        try:
            their_seconds, their_memory, theirs = ask(name)
        except ChildFailed as failure:
            context.fail(f"{peer.title}, head", failure, ours=False)
            continue
        same = same_answer(ours, theirs, np.ones(len(ours)), truth)
        common = {"group": "head", "peer": peer.title, "version": peer.version(), "same_answer": same}
        yield _faster(common, what, seconds, their_seconds)
        yield _smaller(common, f"{what}, transient memory", memory, their_memory)
    bare, _, _ = ask("product")
    yield Result(
        group="head",
        case=f"{what}, beside the product alone",
        peer=HEADS["product"].title,
        version=HEADS["product"].version(),
        ours=seconds,
        theirs=bare,
        unit="s",
        ratio=bare / seconds,
        ratio_says="of the product's speed",
    )


def memory_case(context: Context) -> Iterator[Result]:
    """Each method's transient memory beside its time, over a few long prompts with three replies each."""
    texts = context.texts.draw(context.sizes.prompts, 3, LONG).sample(context.sizes.trial)
    tokens = np.array([len(pair.continuation) for pair in texts.flat()])
    what = f"memory, {texts.source}, {texts.described()}"
    truth = context.truth(texts)

    def ask(name: str, batch: int) -> tuple[float, float, np.ndarray | None]:
        context.say(f"{what}: {METHODS[name].title}")
        request = {"task": "score", "method": name, "batch": batch, "texts": asdict(texts)}
        return _ask(context, **request, model_config=context.model_config, tokenizer=context.tokenizer_folder)

    seconds, memory, ours = ask("ours", 1)
    for name, peer in METHODS.items():
        if name == "ours":
            continue
        batch = best_batch(context, peer, texts)
        try:
            their_seconds, their_memory, theirs = ask(name, batch)
        except ChildFailed as failure:
            context.fail(f"{peer.title}, memory", failure, ours=False)
            continue
        same = same_answer(ours, theirs, tokens, truth)
        common = {"group": "memory", "peer": peer.title, "version": peer.version, "same_answer": same}
        remark = f", {batch} a batch" if peer.batched else ""
        yield _faster(common, f"{what}{remark}, time", seconds, their_seconds)
        yield _smaller(common, f"{what}{remark}, transient memory", memory, their_memory)


def _faster(common: dict[str, Any], case: str, ours: float, theirs: float) -> Result:
    ratio = theirs / ours if common["same_answer"] else None
    return Result(**common, case=f"{case} (1 run each)", ours=ours, theirs=theirs, unit="s", ratio=ratio)


def _smaller(common: dict[str, Any], case: str, ours: float, theirs: float) -> Result:
    ratio = ours / theirs if common["same_answer"] and theirs > 0 else None
    case = f"{case} (ratio = ours / theirs)"
    return Result(**common, case=case, ours=ours, theirs=theirs, unit="MB", ratio=ratio, ratio_says="their memory")
