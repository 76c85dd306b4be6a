"""A run's work folder: checkpoints and the reference's log-probabilities, under a mark that says whose they are."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from slmfast.errors import UserError
from slmfast.store import read_json, remove, remove_temporaries, write_json
from slmfast.training import checkpoint
from slmfast.training.arguments import Run

MARK = "run.json"  # in the work folder: whose checkpoints these are, and the budgets of their packs
REFERENCES = "reference-*.safetensors"  # there, too: log-probabilities of the reference model


def prepare_work(run: Run) -> None:
    """Clears the work folder of half-written files and of what another run left there, and marks it.

    Raises UserError where checkpoints lie in it that bear no mark of ours.
    """
    mark, owner = run.work_folder / MARK, work_owner(run)
    if owner is None and (mark.exists() or checkpoint.folders(run.work_folder)):
        raise UserError(f"{run.work_folder} holds somebody else's checkpoints: choose another work folder")
    if owner is not None:
        remove_temporaries(run.work_folder)
    if owner != run.fingerprint:
        if owner is not None:
            _tell_dropped(run)
            clear_work(run)
        write_json(mark, {"fingerprint": run.fingerprint})


def _tell_dropped(run: Run) -> None:
    """Says on stderr, in one line, what of another run is about to be cleared away."""
    steps = checkpoint.steps_done(run.work_folder)
    if steps:
        print(
            f"train {run.settings.method}: {run.work_folder} holds {steps:,} steps of a run with other settings, data, "
            "seed, threads or versions: they are dropped, and this run begins at its first step",
            file=sys.stderr,
        )


def tell_resumed(run: Run, steps: int) -> None:
    """Says on stderr how many of a run's steps its checkpoints hold."""
    done = checkpoint.steps_done(run.work_folder)
    print(f"train {run.settings.method}: {done:,} of {steps:,} steps are done, going on from there", file=sys.stderr)


def work_owner(run: Run) -> str | None:
    """The fingerprint of the run whose checkpoints the work folder holds; None where it bears no mark of ours."""
    mark = run.work_folder / MARK
    content = read_json(mark) if mark.is_file() else None
    return content.get("fingerprint") if isinstance(content, dict) else None


def clear_work(run: Run) -> None:
    """Removes what a run keeps in its marked work folder, and the folder where nothing else is in it."""
    checkpoint.prune(run.work_folder, keep=0)
    for file in (*run.work_folder.glob(REFERENCES), run.work_folder / MARK):  # the mark goes last
        remove(file)
    for folder in (run.work_folder, run.work_folder.parent if run.work is None else run.work_folder):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def tidied(run: Run) -> Iterator[None]:
    """Where a run is refused before it has done anything, no work folder stays behind."""
    try:
        yield
    except UserError:
        owned = bool(run.fingerprint) and work_owner(run) == run.fingerprint
        if owned and not checkpoint.folders(run.work_folder) and not any(run.work_folder.glob(REFERENCES)):
            clear_work(run)
        raise
