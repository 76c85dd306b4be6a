"""One training run from its arguments to a complete model folder: what SFT and KTO share."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from slmfast.errors import NO_ROOM, UserError
from slmfast.model_folder import SINGLE, check_model_folder, check_output, write_companions, write_tensors
from slmfast.reporting.model_card import write_training_card
from slmfast.store import atomic_path, model_digest, write_json
from slmfast.training import checkpoint
from slmfast.training.arguments import CARD, Run, check_arguments, fingerprint_of, is_done, refuse_other
from slmfast.training.budgeted import enforced, fitted
from slmfast.training.data import StepOrder, TokenSet, dataset_digest, load_tokens, longest_sequence, make_groups
from slmfast.training.extras import add_extras, check_extras, merge_adapters
from slmfast.training.forward_sees import report_update
from slmfast.training.loading import check_names, load_model, load_tokenizer
from slmfast.training.optimizer import make_optimizer, rate_factor
from slmfast.training.pack_budget import PackBudget, usual_budget
from slmfast.training.passes import Passes, split_weights
from slmfast.training.settings import TrainSettings
from slmfast.training.split_weights import SplitWeights
from slmfast.training.trainer import Objective, ShowProgress, StepTrainer
from slmfast.training.work_folder import MARK, clear_work, prepare_work, tell_resumed, tidied, work_owner

LOG = "training_log.json"


@dataclass(frozen=True)
class Setup:
    """What a run has made of its arguments by the time that an objective is asked for."""

    tokens: TokenSet
    groups: list[range]
    order: StepOrder
    passes: Passes
    budget: PackBudget


MakeObjective = Callable[[nn.Module, Setup], Objective]


def train(run: Run, method: str, make_objective: MakeObjective, models: dict[str, Path] | None = None) -> Path:
    """Trains as `run` says and writes the model; returns its folder.

    An output that the same run has already made is left as it is.

    Args:
        models: folders that the result depends on besides the starting model's, by what they are to it.
    """
    models = models or {}
    settings = run.settings
    if settings.method != method:
        raise UserError(f"method is {settings.method!r} in the settings of train_{method}: set it to {method!r}")
    check_arguments(run)
    check_extras(settings)
    check_model_folder(run.model)
    check_output(run.output, CARD, [run.model, run.dataset, *models.values()])
    with _threads(run.threads), _quiet_transformers(), tidied(run), _full_disk_named(run), enforced(settings.budget):
        run.fingerprint = fingerprint_of(run, {name: model_digest(path) for name, path in models.items()})
        if is_done(run):
            if work_owner(run) == run.fingerprint:  # killed when all was done but this
                clear_work(run)
            return run.output
        refuse_other(run)
        model = load_model(run.model)
        check_names(run.model, model)
        add_extras(model, settings, run.seed)
        prepare_work(run)
        # A model is never trained beyond the positions it knows, whatever max_length allows.
        settings = replace(settings, max_length=min(settings.max_length, _positions(model, settings)))
        setup, arguments = _set_up(run, settings, model)
        print(describe(settings, setup), file=sys.stderr)
        masters = split_weights(model, settings.forward) if settings.splits_weights else None
        optimizer = make_optimizer(model, settings, settings.warmup_steps(len(setup.order)), masters)
        objective = make_objective(model, setup)
        scheduler = LambdaLR(optimizer, rate_factor(settings, len(setup.order)))
        trainer = StepTrainer(model, objective, setup.order, arguments, (optimizer, scheduler), setup.budget)
        if run.progress:
            trainer.add_callback(ShowProgress(method))
        found = checkpoint.latest(run.work_folder)
        if found:
            tell_resumed(run, len(setup.order))
        trainer.train(resume_from_checkpoint=str(found) if found else None)
        _export(run, model, masters, setup, trainer.history(), models)
    clear_work(run)
    return run.output


def _set_up(run: Run, settings: TrainSettings, model: nn.Module) -> tuple[Setup, TrainingArguments]:
    """Reads the data, decides on packs and puts the model on its device."""
    tokens = load_tokens(run.dataset, load_tokenizer(run.model), settings)
    groups = make_groups(len(tokens), settings.batch_size)
    order = StepOrder(len(groups), settings.accumulation, settings.epochs, run.seed)
    arguments = _arguments(run, order)
    longest = longest_sequence(tokens, groups, settings.takes_pairs)
    warmup, mark = settings.warmup_steps(len(order)), run.work_folder / MARK
    passes, budget = fit_to_device(model, settings, mark, arguments.device, longest, warmup)
    return Setup(tokens, groups, order, passes, budget), arguments


def fit_to_device(
    model: nn.Module, settings: TrainSettings, mark: Path, device: torch.device, longest: int, warmup_steps: int
) -> tuple[Passes, PackBudget]:
    """Decides on packs and checkpointing, and puts the model on its device.

    Args:
        mark: the file that keeps the choice.
        longest: tokens of the longest sequence of the data, mismatched pairs included.

    Raises:
        UserError: the run can't fit.
    """
    settings = fitted(settings, mark, model, device, longest, warmup_steps)  # before the device has to hold any
    model.to(device)
    passes = Passes(settings.forward, _checkpoints(settings, device), device)
    return passes, PackBudget(mark, lambda: _pack_tokens(model, settings, passes))


def describe(settings: TrainSettings, setup: Setup) -> str:
    """What a run is about to do, in one line: data, step, number of steps, schedule, packs."""
    tokens, order = setup.tokens, setup.order
    warmup, factor = settings.warmup_steps(len(order)), rate_factor(settings, len(order))
    skipped = f" ({tokens.skipped:,} over {settings.max_length} tokens left out)" if tokens.skipped else ""
    return (
        f"train {settings.method}: {len(tokens):,} rows{skipped}; {settings.batch_size} x {settings.accumulation} = "
        f"{settings.effective_batch:,} samples a step; {order.steps_per_epoch:,} steps x {settings.epochs} epochs = "
        f"{len(order):,} steps; {settings.schedule} schedule to {settings.learning_rate:g}, {warmup} warm-up steps, "
        f"the first at {settings.learning_rate * factor(0):g}; {settings.optimizer}, {settings.forward} forward, packs "
        f"of at most {setup.budget.at(0):,} tokens{', layers checkpointed' if setup.passes.checkpointing else ''}"
    )


def _checkpoints(settings: TrainSettings, device: torch.device) -> bool:
    return settings.checkpointing == "on" or (settings.checkpointing == "auto" and device.type == "cuda")


def _pack_tokens(model: nn.Module, settings: TrainSettings, passes: Passes) -> int:
    states = 8 if settings.optimizer == "adamw" else 2
    return settings.pack_tokens or usual_budget(model, passes.checkpointing, states)


def _arguments(run: Run, order: StepOrder) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run.work_folder),
        per_device_train_batch_size=1,  # one item of the order is a whole step
        gradient_accumulation_steps=1,
        max_steps=len(order),
        max_grad_norm=run.settings.clip,
        save_strategy="steps",
        save_steps=run.settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=run.settings.report_to,
        log_level="error",
        seed=run.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.world_size > 1:
        raise UserError("training was launched in several processes, each of which would train alone: launch one")
    arguments._n_gpu = 1  # with more in sight, transformers would wrap the model in DataParallel
    return arguments


def _positions(model: nn.Module, settings: TrainSettings) -> int:
    """How many positions a model's config says it knows, whatever it calls them."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.max_length


def _export(
    run: Run,
    model: nn.Module,
    masters: SplitWeights | None,
    setup: Setup,
    history: list[dict[str, float]],
    models: dict[str, Path],
) -> None:
    """Writes the complete model folder: fp32 weights, config, tokenizer, cards and log."""
    merge_adapters(model)
    parameters = dict(sorted(model.named_parameters()))
    card = {
        "method": run.settings.method,
        "settings": asdict(run.settings),
        "seed": run.seed,
        "rows": len(setup.tokens),
        "rows_over_the_window": setup.tokens.skipped,
        "steps": len(setup.order),
        "steps_per_epoch": setup.order.steps_per_epoch,
        "pack_tokens": setup.budget.history,
        "fingerprint": run.fingerprint,
        **report_update(run.model, model, masters, run.settings),
    }
    values = parameters.values() if masters is None else map(masters.merged, parameters.values())  # one at a time
    with atomic_path(run.output) as folder:
        folder.mkdir()
        write_companions(run.model, folder, torch.float32)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        write_tensors(folder / SINGLE, shapes, torch.float32, values)
        write_json(folder / LOG, history)
        write_json(folder / CARD, card)
        write_training_card(
            folder,
            start=run.model,
            reference=models.get("reference"),
            weights=sum(math.prod(shape) for shape in shapes.values()),
            data_digest=dataset_digest(run.dataset),
            card=card,
            history=history,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Fixes torch's number of threads, on which the order of its sums depends."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _full_disk_named(run: Run) -> Iterator[None]:
    """Turns a disk without room into one line; what is half-written goes, and what was whole before stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"no room is left on the disk for {run.output} or its checkpoints in {run.work_folder}: free some and "
            "start the same run again, which goes on from the last checkpoint"
        ) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and notes off the user's screen."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
