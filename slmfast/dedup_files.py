"""Dedup of one column of a Parquet, JSON lines or CSV file, for the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json

from slmfast.errors import UserError
from slmfast.near_duplicates import dedup
from slmfast.store import write_table

READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def dedup_file(path: Path, column: str, output: Path, **settings: Any) -> tuple[int, int]:
    """Writes kept.parquet (the rows that stay, in order) and dropped.parquet (row, duplicate_of, distance) to `output`.

    `settings` are those of slmfast.dedup. Gives the number of kept and of dropped rows.
    """
    if path.suffix not in READERS:
        raise UserError(f"{path}: give a file that ends in {', '.join(READERS)}")
    if not path.exists():
        raise UserError(f"{path} does not exist: give an existing file")
    if output.is_file() or (output.exists() and any(output.iterdir())):
        raise UserError(f"{output} is a file or holds files: give a new folder with -o")
    try:
        table = pyarrow.dataset.dataset(path, format=READERS[path.suffix]).to_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not readable as {READERS[path.suffix]}: {' '.join(str(error).split())}") from error
    if column not in table.column_names:
        raise UserError(f"{path} has no column {column}: --column takes one of {', '.join(table.column_names)}")
    try:
        result = dedup(table.column(column), **settings)
    except (TypeError, ValueError) as error:  # not a column of texts, or a text that isn't Unicode
        raise UserError(f"{path}, column {column}: {error}") from error
    gone = np.flatnonzero(~result.keep)
    dropped = {"row": gone, "duplicate_of": result.duplicate_of[gone], "distance": result.distance[gone]}
    write_table(output / "kept.parquet", table.filter(pa.array(result.keep)))
    write_table(output / "dropped.parquet", pa.table(dropped))
    return result.n_kept, len(gone)
