"""What a stage is given, and the two ways in which stages walk through rows: as a stream, or in units of work."""

import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from slmfast.engines import Engine, open_engine
from slmfast.engines.settings import HTTP
from slmfast.errors import UserError
from slmfast.progress import Progress
from slmfast.recipe import Recipe, expand
from slmfast.records import DROPPED_SCHEMA
from slmfast.store import WORK, count_rows, read_batches, shard_path, shards, table_schema, write_table

BUILTIN = "builtin:"
BUILTIN_MODELS = Path(__file__).parent / "miniature" / "models"


class Counts(NamedTuple):
    """What became of the instructions that a stage was given. `rows_in` is None where a stage doesn't take any."""

    rows_in: int | None
    out: int
    dropped: int = 0
    rejected: int = 0

    def check(self, stage: str) -> None:
        """Raises RuntimeError where rows went missing or came from nowhere: a fault of ours, never of the input."""
        if self.rows_in is not None and self.rows_in != self.out + self.dropped + self.rejected:
            raise RuntimeError(
                f"{stage} is out of balance: {self.rows_in} in, but {self.out} out + {self.dropped} dropped + "
                f"{self.rejected} rejected; please report this with the run's recipe"
            )


@dataclass
class Job:
    """One stage's piece of a run: its settings, where its inputs lie, and the folder that is its alone."""

    stage: str
    recipe: Recipe
    run_dir: Path
    folder: Path
    inputs: dict[str, Path]  # the folder of each stage that this one reads
    notes: dict[str, Any] = field(default_factory=dict)  # plain figures for the manifest, which the report reads

    @property
    def settings(self) -> Any:
        """The recipe's section of this stage."""
        return getattr(self.recipe, self.stage)

    @property
    def alone(self) -> bool:
        """Whether the stage runs by itself and not as a part of a run."""
        return self.folder == self.run_dir

    @property
    def work(self) -> Path:
        """A folder for partial work, which goes when the stage is done."""
        folder = self.folder / WORK
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def table(self, name: str) -> Path:
        """The folder of one of this stage's own tables."""
        return self.folder / name

    def input(self, stage: str, table: str = "records") -> Path:
        """The folder of a table of an earlier stage, or of a table given by itself."""
        folder = self.inputs[stage]
        return folder / table if (folder / table).is_dir() or table != "records" else folder

    def model(self, role: str) -> str:
        """The folder of the model in a role: base, large, small or judge; of a server's model, its tokenizer's."""
        return resolve_model(self.recipe, role, self.run_dir)

    def model_name(self, role: str) -> str:
        """What the recipe calls the model in a role; on a server, the server's name of it."""
        return self.recipe.model_name(role)

    @contextmanager
    def engine(self, role: str) -> Iterator[Engine]:
        """The engine of the model in a role. What it has to say of its work goes into the manifest's notes."""
        key = f"engines.{self.recipe.engine_role(role)}"
        store = self.work / f"replies-{role}.sqlite"
        engine = open_engine(self.recipe.engine(role), self.model(role), role=role, key=key, store=store)
        try:
            yield engine
            if notes := engine.notes():
                self.notes.setdefault("engines", {})[role] = notes
        finally:
            engine.close()


def resolve_model(recipe: Recipe, role: str, run_dir: Path) -> str:
    """The folder of the model that a recipe gives a role; a hub model is fetched first.

    Of a model that a server runs it is the tokenizer's folder. Raises UserError where there is no such model.
    """
    served = recipe.engine(role).kind in HTTP
    key = f"models.{role}"
    name = getattr(recipe.models, role)
    if served:
        key, name = f"engines.{recipe.engine_role(role)}.tokenizer", recipe.engine(role).tokenizer
    elif role == "judge" and name is None:
        key, name = "models.large", recipe.models.large
    if name.startswith(BUILTIN):
        folder = BUILTIN_MODELS / name.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            known = ", ".join(BUILTIN + p.name for p in sorted(BUILTIN_MODELS.iterdir()) if p.is_dir())
            raise UserError(f"recipe key {key}: there is no {name}; the built-in models are {known}")
        return str(folder)
    name = expand(name, {"RUN": run_dir}, key)
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"recipe key {key}: {local} holds no config.json; give a complete model folder")
        if not served and not any(local.glob("*.safetensors")):
            raise UserError(f"recipe key {key}: {local} holds no weights (*.safetensors); give a complete model folder")
        return str(local)
    # "owner/name" may be a hub name; anything that looks like a path must exist.
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"recipe key {key}: no model at {name}; give a model folder, a hub name or {BUILTIN}large")
    return download_model(name, key, weights=not served)


@functools.cache
def download_model(name: str, key: str, weights: bool = True) -> str:
    """The local folder of a hub model, "owner/name" or "owner/name@revision", fetched if it isn't in the cache yet."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + (["*.safetensors"] if weights else [])  # no pickled weights
    try:
        return snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # the hub's client raises many kinds; the user needs one line about the model
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"recipe key {key}: {name} can't be fetched from the hub ({reason}): give a folder") from error


def dropped_row(stage: str, row: dict[str, Any], reason: str) -> dict[str, Any]:
    """A row of the `dropped` table for a record that a stage doesn't keep."""
    kept = {name: row[name] for name in ("id", "source", "source_row")}
    return {**kept, "stage": stage, "reason": reason, "duplicate_of": None, "distance": None}


def rebatch(table: Path, rows: int) -> Iterator[pa.Table]:
    """Streams a table in pieces of exactly `rows` rows, the last one excepted."""
    pending: list[pa.RecordBatch] = []
    have = 0
    for batch in read_batches(table, rows=rows):
        while batch.num_rows:
            piece = batch.slice(0, rows - have)
            pending.append(piece)
            have += piece.num_rows
            batch = batch.slice(piece.num_rows)
            if have == rows:
                yield pa.Table.from_batches(pending)
                pending, have = [], 0
    if pending:
        yield pa.Table.from_batches(pending)


Rows = list[dict[str, Any]]


class _Unit(NamedTuple):
    number: int
    rows: int
    given: tuple[Rows, Any] | None  # its rows and what `begin` made of them; None where it is done


def run_units(
    job: Job,
    source: Path,
    columns: list[pa.Field],
    rows: int,
    work: Callable[[Rows, Any], tuple[Rows, Rows]],
    first_dropped: int = 0,
    *,
    begin: Callable[[Rows], Any] = lambda rows: None,
    engines: Sequence[Engine] = (),
) -> None:
    """Puts a table through `work` in units of `rows` rows, each of which is written whole or not at all.

    `work` takes rows as dictionaries, with what `begin` gave for them, and gives the rows to keep, with the new
    `columns` filled in, and rows for the `dropped` table. Unit i becomes shard i of `records` and shard
    `first_dropped` + i of `dropped`. Units that an earlier, broken run has finished stay as they are, so a unit must
    be a function of its own rows alone. `begin` is called some units ahead, as far as the engines want to be told, so
    that a server never waits for a unit's slowest reply.
    """
    schema = table_schema(source)
    for column in columns:
        schema = schema.append(column)

    def states() -> str:
        return "; ".join(filter(None, (engine.state() for engine in engines)))

    progress = Progress(job.stage, count_rows(source), about=states)
    for engine in engines:
        engine.waiting = progress.show

    def begun() -> Iterator[_Unit]:
        for number, table in enumerate(rebatch(source, rows)):
            done = shard_path(job.table("records"), number).exists()
            yield _Unit(number, table.num_rows, None if done else (unit := table.to_pylist(), begin(unit)))

    for unit in _looked_ahead(begun(), max((engine.ahead for engine in engines), default=0)):
        if unit.given is None:
            progress.skip(unit.rows)
            continue
        kept, dropped = work(*unit.given)
        # The dropped rows first: that the unit's records exist says that all of it does.
        dropped_path = shard_path(job.table("dropped"), first_dropped + unit.number)
        write_table(dropped_path, pa.Table.from_pylist(dropped, schema=DROPPED_SCHEMA))
        write_table(shard_path(job.table("records"), unit.number), pa.Table.from_pylist(kept, schema=schema))
        progress.add(unit.rows)
    progress.close()
    if not shard_path(job.table("records"), 0).exists():
        write_table(shard_path(job.table("records"), 0), pa.Table.from_pylist([], schema=schema))


def _looked_ahead(units: Iterable[_Unit], rows: int) -> Iterator[_Unit]:
    """The units in order, each given when at least `rows` rows of later ones are begun."""
    queue: deque[_Unit] = deque()
    for unit in units:
        queue.append(unit)
        while queue and (queue[0].given is None or sum(u.rows for u in queue if u.given) - queue[0].rows >= rows):
            yield queue.popleft()
    yield from queue


def unit_counts(job: Job, source: Path) -> Counts:
    """The balance of a stage whose tables are written, read from the shards' footers."""
    return Counts(count_rows(source), count_rows(job.table("records")), count_rows(job.table("dropped")))


def check_kept(job: Job, first_dropped: int = 0) -> None:
    """Raises UserError where a stage that asks a model keeps no record: a later stage could only fail over it.

    Shards of `dropped` before `first_dropped` are of rows that no model was asked about.
    """
    paths = shards(job.table("dropped"))[first_dropped:]
    reasons = Counter(r for path in paths for r in pq.read_table(path, columns=["reason"]).column(0).to_pylist())
    if reasons and not count_rows(job.table("records")):
        reason, number = reasons.most_common(1)[0]
        raise UserError(
            f"{job.stage} keeps no record ({number:,} go for: {reason}): correct the recipe's {job.stage}, models or "
            f"engines, or where it was the server's fault delete {job.folder}, and run again"
        )


def shard_rows(path: Path) -> int:
    """The number of rows of one shard."""
    return pq.read_metadata(path).num_rows
