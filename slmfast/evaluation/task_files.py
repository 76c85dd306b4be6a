"""Task files of our own: lm-eval's YAML, with `${DATA}` for the folder of their data."""

import re
from pathlib import Path

from slmfast.errors import UserError

MINIATURE_TASKS = Path(__file__).parent.parent / "miniature" / "tasks"


def _own_tasks(folder: str) -> list[Path]:
    source = MINIATURE_TASKS if folder == "builtin:miniature" else Path(folder)
    files = sorted(source.glob("*.yaml"))
    if not files:
        raise UserError(f"recipe key evaluate.task_folder: {source} holds no *.yaml task file")
    return files


def task_files(folder: str | None, data: str | None) -> list[Path]:
    """Our own task files, and those files of their data that are there already."""
    if folder is None:
        return []
    found = _own_tasks(folder)
    for file in list(found):
        for name in re.findall(r"\$\{DATA\}/([^\s\"']+)", file.read_text(encoding="utf-8")):
            found += sorted(path for path in Path(data or "").glob(name) if path.is_file())
    return found


def task_folder(folder: str | None, data: str | None, target: Path) -> Path | None:
    """Copies lm-eval task files to `target`, with `${DATA}` replaced by the folder of their data.

    lm-eval takes data files relative to the working directory, so the copies name them in full.
    """
    if folder is None:
        return None
    target.mkdir(parents=True, exist_ok=True)
    for file in _own_tasks(folder):
        text = file.read_text(encoding="utf-8")
        if "${DATA}" in text and data is None:
            raise UserError(f"{file} needs ${{DATA}}: set evaluate.data (or --data) to the folder of its data")
        (target / file.name).write_text(text.replace("${DATA}", str(data)), encoding="utf-8")
    return target
