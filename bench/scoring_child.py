"""Work of the scoring benchmark that needs a process of its own, because its peak memory is taken.

python scoring_child.py REQUEST.json    prints one line of JSON: {"seconds", "bytes"}; the answer goes to a .npy file

A request names its task: "score" (a method over a set) or "head" (a way to log-probabilities from hidden states).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scoring_heads import HEADS, head_inputs
from scoring_methods import METHODS, Subject
from scoring_model import model_config, random_model
from scoring_texts import TextSet
from transient import Measured, transient

from slmfast.scoring.loading import load_tokenizer


def score(request: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Measured:
    """A method over a set, after one short run that sets up what is set up once."""
    model = random_model(model_config(request["model_config"]), dtype, device, request["seed"])
    subject = Subject(model, load_tokenizer(request["tokenizer"]))
    method = METHODS[request["method"]]
    texts = TextSet.of_document(request["texts"])
    method.run(subject, texts.shortest(), 1)
    return transient(lambda: method.run(subject, texts, request["batch"]), device)


def head(request: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Measured:
    """A head over random hidden states, after a run over a few of them."""
    call = HEADS[request["method"]].load()
    shape = request["positions"], request["width"], request["vocabulary"]
    hidden, weight, targets = head_inputs(*shape, dtype, device, request["seed"])
    runs = [torch.no_grad()(lambda n=n: call(hidden[:n], weight, targets[:n])) for n in (16, len(hidden))]
    runs[0]()
    measured = transient(runs[1], device)
    if device.type == "cuda":  # kernels are chosen for the shape at its first call, which is not what is timed
        measured = transient(runs[1], device)
    value = measured.value
    return Measured(None if value is None else value.double().cpu().numpy(), measured.seconds, measured.bytes)


def main(path: str) -> None:
    """Runs one request."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    task = {"score": score, "head": head}[request["task"]]
    measured = task(request, torch.device(request["device"]), getattr(torch, request["dtype"]))
    if measured.value is not None:
        np.save(request["output"], measured.value)
    print(json.dumps({"seconds": measured.seconds, "bytes": measured.bytes}))


if __name__ == "__main__":
    main(sys.argv[1])
