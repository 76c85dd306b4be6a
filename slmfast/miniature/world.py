"""write_world: raw files in the six seed formats, the evaluation items, and the truth about every record."""

import gzip
import io
import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from slmfast.miniature import replies
from slmfast.miniature.evaluation_items import write_evaluation
from slmfast.miniature.examples import conversation_before
from slmfast.miniature.malformed import spoiled
from slmfast.miniature.near_copies import near_copy
from slmfast.miniature.raw_files import FILES, SOURCES, Messages, render
from slmfast.miniature.skills import SKILLS, Item, draw_item
from slmfast.miniature.stories import story
from slmfast.miniature.truth import write_truth
from slmfast.records import prompt_text
from slmfast.store import atomic_path

NEAR_DUPLICATE_SHARE = 0.08
MALFORMED_SHARE = 0.02
WRONG_SHARE = 0.38  # of the well-formed replies
LONG_SHARE = 0.12
_DEALT_TO = {"school_math": ("Math",), "camel": ("Math", "Code", "Comparison", "Knowledge", "Science")}


@dataclass(slots=True)
class Entry:
    """A raw record on its way into a file."""

    source: str
    item: Item
    messages: Messages
    reply: str
    order: float  # records of a file stand in this order
    kind: str = "original"
    original: "Entry | None" = None
    place: dict[str, Any] = field(default_factory=dict)  # source_row, file and line, once it is written


def write_world(directory: Path | str, *, size: int = 6000, seed: int = 0) -> None:
    """Writes about `size` raw records (exactly so many), the evaluation items and truth.parquet under `directory`.

    The same size and seed give the same bytes. Every file appears by atomic rename.
    """
    directory, rng = Path(directory), Random(f"{size} {seed}")
    copies, malformed = round(size * NEAR_DUPLICATE_SHARE), round(size * MALFORMED_SHARE)
    entries = _originals(size - copies - malformed, rng)
    entries += _near_copies([entry for entry in entries if len(entry.messages) == 1], copies, rng)
    entries += [_malformed(rng) for _ in range(malformed)]
    _write_files(directory, entries, rng)
    write_truth(directory / "truth.parquet", [_truth(entry) for entry in entries])
    write_evaluation(directory, seed)


def _originals(count: int, rng: Random) -> list[Entry]:
    """Records with prompts that all differ, their skills in fixed proportions."""
    seen: set[str] = set()
    entries: list[Entry] = []
    for skill in _quota(count):
        entry = _original(skill, rng)
        tries = 0
        while (text := prompt_text(entry.messages).casefold()) in seen:
            # A large world runs out of days of the week: then it asks for sums, of which there are plenty.
            tries += 1
            entry = _original(skill if tries < 100 else "gain", rng)
        seen.add(text)
        entries.append(entry)
    return entries


def _quota(count: int) -> list[str]:
    """The skill of each record: every skill by its weight, what rounding leaves to the most frequent ones."""
    total = sum(skill.weight for skill in SKILLS.values())
    quota = [name for name, skill in SKILLS.items() for _ in range(count * skill.weight // total)]
    frequent = sorted(SKILLS, key=lambda name: -SKILLS[name].weight)
    return quota + [frequent[i % len(frequent[:10])] for i in range(count - len(quota))]


def _original(skill: str, rng: Random) -> Entry:
    language = rng.choice(("en", "zh"))
    item = draw_item(skill, language, rng)
    source = _deal(item, rng)
    if source == "school_math":
        item = replace(item, question=f"题目：{item.question}")
    if rng.random() < LONG_SHARE:
        item = replace(item, context=story(language, rng))
    turns = {"belle": 0.15, "coig": 0.12}.get(source, 0.0)
    return Entry(source, item, conversation_before(item, rng, turns), _reply(item, rng), rng.random())


def _deal(item: Item, rng: Random) -> str:
    """A source for an item: of its language, and one that has such instructions."""
    primary = item.label.split("-")[0]
    sources = [
        source
        for source, (language, _) in SOURCES.items()
        if language == item.language and primary in _DEALT_TO.get(source, (primary,))
    ]
    return rng.choices(sources, [SOURCES[source][1] for source in sources])[0]


def _reply(item: Item, rng: Random) -> str:
    if rng.random() >= WRONG_SHARE:
        return item.answer
    other = draw_item(rng.choice(list(SKILLS)), item.language, rng)
    return replies.wrong_reply(item, rng, other)


def _near_copies(originals: list[Entry], count: int, rng: Random) -> list[Entry]:
    """Near-duplicates, each later in the order of sources and records than its original."""
    copies: list[Entry] = []
    order = list(SOURCES)
    long = [entry for entry in originals if entry.item.context]
    for original in rng.sample(originals, len(originals)):
        if len(copies) == count:
            break
        if len(copies) % 4 == 0:
            original = rng.choice(long)
        copied = near_copy(original.item, prompt_text(original.messages), rng)
        places = [
            source
            for source in order[order.index(original.source) :]
            if SOURCES[source][0] == original.item.language
            and original.item.label.split("-")[0] in _DEALT_TO.get(source, (original.item.label.split("-")[0],))
            and (source != original.source or len(FILES[source]) == 1)
        ]
        if copied is None or not places:
            continue
        source = rng.choice(places)
        later = original.order + (1 - original.order) * rng.random() if source == original.source else rng.random()
        messages = [{"role": "user", "content": copied}]
        reply = _reply(original.item, rng)
        copies.append(Entry(source, original.item, messages, reply, later, "near_duplicate", original))
    return copies


def _malformed(rng: Random) -> Entry:
    entry = _original(rng.choice(["add", "subtract", "largest", "reverse", "to_chinese", "code_print"]), rng)
    entry.kind = "malformed"
    return entry


def _write_files(directory: Path, entries: list[Entry], rng: Random) -> None:
    """Writes all raw files and notes in each entry where it stands."""
    by_file: dict[str, list[tuple[Entry, bytes]]] = defaultdict(list)
    for number, entry in enumerate(sorted(entries, key=lambda entry: entry.order)):
        if entry.kind == "malformed":
            file, data = spoiled(entry.source, entry.item.label, number, entry.messages, entry.reply, rng)
        else:
            file, value = render(entry.source, entry.item.label, number, entry.messages, entry.reply)
            data = json.dumps(value, ensure_ascii=False).encode()
        by_file[file].append((entry, data))
    for files in FILES.values():
        row = 0
        for file, form in files.items():
            for i, (entry, _) in enumerate(by_file[file]):
                where = {"file": f"{file}/{_member(i)}", "line": 1} if form == "tar" else {"file": file, "line": i + 1}
                entry.place = {"source_row": row, **where}
                row += 1
            if by_file[file]:
                _write_file(directory / file, form, [data for _, data in by_file[file]])


def _write_file(path: Path, form: str, records: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if form == "tar":
            temporary.write_bytes(_archive(records))
        elif form == "array":
            temporary.write_bytes(b"[\n" + b",\n".join(records) + b"\n]\n")
        else:
            temporary.write_bytes(b"".join(record + b"\n" for record in records))


def _archive(records: list[bytes]) -> bytes:
    """A tar.gz of one member a record, without times or owners: the same records give the same bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for i, record in enumerate(records):
            member = tarfile.TarInfo(_member(i))
            member.size = len(record)
            archive.addfile(member, io.BytesIO(record))
    return packed.getvalue()


def _member(i: int) -> str:
    return f"{i:05d}.json"


def _truth(entry: Entry) -> dict[str, Any]:
    item, original, spoilt = entry.item, entry.original, entry.kind == "malformed"
    return {
        "source": entry.source,
        **entry.place,
        "kind": entry.kind,
        "duplicate_source": original.source if original else None,
        "duplicate_source_row": original.place["source_row"] if original else None,
        "task": item.skill,
        "label": item.label,
        "language": item.language,
        "prompt": prompt_text(entry.messages),
        "answer": item.answer,
        "reply_right": None if spoilt else replies.is_right(item.skill, item.answer, entry.reply),
        "instruction_safe": item.safe,
        "reply_safe": None if spoilt else replies.is_safe(item.skill, entry.reply),
    }
