"""The arguments of a training run, and the hash by which a result is known to be theirs."""

import importlib.util
from dataclasses import asdict, dataclass, field
from numbers import Integral
from pathlib import Path

import torch
import transformers

from slmfast.errors import UserError
from slmfast.store import digest, model_digest, read_json
from slmfast.training.data import dataset_digest
from slmfast.training.settings import TrainSettings

CARD = "training.json"
# On a result's bytes. A budget decides on packs, as the device's memory does where none is set; the mark keeps them.
WITHOUT_EFFECT = ("save_steps", "checkpointing", "report_to", "budget")


@dataclass
class Run:
    """The arguments of one training run, and the hash of all that decides its result."""

    model: Path
    dataset: Path
    output: Path
    settings: TrainSettings
    seed: int
    threads: int
    work: Path | None
    progress: bool
    fingerprint: str = field(default="", init=False)

    @property
    def work_folder(self) -> Path:
        """Where checkpoints and the reference's log-probabilities lie."""
        return self.work or self.output.parent / ".work" / self.output.name


def check_arguments(run: Run) -> None:
    """Raises UserError where a seed is none, or where the report goes to a package that is not installed."""
    _check_seed(run)
    _check_report(run.settings)


def _check_seed(run: Run) -> None:
    if isinstance(run.seed, bool) or not isinstance(run.seed, Integral) or not 0 <= run.seed < 2**32:
        raise UserError(f"seed is {run.seed!r}: set it to a whole number from 0 to {2**32 - 1}")
    run.seed = int(run.seed)


def _check_report(settings: TrainSettings) -> None:
    """Refuses to report to what is not installed; transformers would find that out in the middle of its start."""
    packages = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}[settings.report_to]
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(f"report_to is {settings.report_to!r}, which is not installed: pip install {packages[0]}")


def fingerprint_of(run: Run, inputs: dict[str, str]) -> str:
    """A hash of all that decides the result's bytes."""
    settings = {key: value for key, value in asdict(run.settings).items() if key not in WITHOUT_EFFECT}
    versions = [torch.__version__, transformers.__version__]
    data = dataset_digest(run.dataset)
    return digest([model_digest(run.model), data, inputs, settings, run.seed, torch.get_num_threads(), versions])


def is_done(run: Run) -> bool:
    """Whether the output is the finished model of this very run."""
    card = run.output / CARD
    return card.is_file() and read_json(card).get("fingerprint") == run.fingerprint


def refuse_other(run: Run) -> None:
    """Refuses to replace a finished model by one of another run: it may have taken days."""
    if (run.output / CARD).is_file():
        raise UserError(
            f"{run.output} holds a finished model of other settings, data, seed, threads or versions: choose another "
            "output folder, or remove that one"
        )
