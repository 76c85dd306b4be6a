"""A dry run of collect: every raw record is read and parsed, none is written, and all problems are counted by file."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from slmfast.errors import UserError
from slmfast.progress import Progress
from slmfast.readers import Rejection, read_source, without_places

SHOWN = 5  # problems of a file that are told one by one
SHOWN_CHARACTERS = 200  # of a reason


def check_sources(
    sources: Iterable[tuple[str, str, list[Path]]],
    max_text_bytes: int,
    say: Callable[[str], None] = print,
    shown: int = SHOWN,
) -> int:
    """Checks (name, format, files) one file after the other and gives the number of problems.

    Tells, for each file, its records and the first `shown` problems by line, element or row, and at the end all
    reasons with their counts. A file of which nothing can be read, which would stop collect, is one problem.
    """
    reasons: Counter[str] = Counter()
    records = files = 0
    progress = Progress("check")
    for name, format, paths in sources:
        for path in paths:
            read, problems, first = _check_file(name, format, path, max_text_bytes, shown, progress)
            progress.close()  # its line gives way to the file's
            files += 1
            records += read
            reasons += problems
            say(f"{name}: {path}: {_count(read, 'record')}, {_problems(problems.total())}")
            for line in first:
                say(f"  {line}")
            if problems.total() > len(first):
                say(f"  and {problems.total() - len(first):,} more")
    total = reasons.total()
    if total:
        say("")
        for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
            say(f"{count:>10,}  {reason}")
    say(f"{_count(files, 'file')}: {_count(records, 'record')}, {_problems(total)}")
    return total


def _check_file(
    name: str, format: str, path: Path, max_text_bytes: int, shown: int, progress: Progress
) -> tuple[int, Counter[str], list[str]]:
    records, problems, first = 0, Counter[str](), []
    try:
        for item in read_source(name, format, path, max_text_bytes=max_text_bytes):
            progress.add()
            if not isinstance(item, Rejection):
                records += 1
                continue
            problems[without_places(item.reason)[:SHOWN_CHARACTERS]] += 1
            if len(first) < shown:
                member = item.file.removeprefix(path.name).lstrip("/")
                first.append(
                    f"{f'{member}, ' if member else ''}{item.unit} {item.line}: {item.reason[:SHOWN_CHARACTERS]}"
                )
    except UserError as error:
        if not records:  # what was found so far is the same fault
            problems, first = Counter(), []
        problems["a file that can't be read at all, which stops collect"] += 1
        first = [*first[: max(shown - 1, 0)], str(error)]
    return records, problems, first


def _problems(number: int) -> str:
    return _count(number, "problem") if number else "no problems"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
