"""Near-duplicate search beside named peers: one command, one table a group, one line of JSON.

    slmfast bench dedup --install-peers     once: the peers, each into an environment of its own under .peers/
    slmfast bench dedup                     all cases at sizes that end in about five minutes on two cores
    slmfast bench dedup --full              the sizes of the project's targets (half an hour or more, and 10 GB)
    slmfast bench dedup --case join --n 5000000

Joins are compared at identical sets of pairs: without them no ratio is printed and the exit code is 1. Where a peer
hashes other features, both rates are printed, and the quality table says what each finds. A peer too slow for the size
that was asked for is measured at the largest fifth (n / 5, n / 25 ...) that it is expected to finish in --peer-seconds,
and ours at that same size. Times are the best of a few runs, of as many on both sides; the case says of how many. Every
run of a peer is a process of its own, which times its hot call alone; ours run in one process. A case that fails is
named below the tables, and the exit code is 1.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder, which is in no package

from context import Context
from joins import join_cases, k8_case, large_case
from peers import PEERS, PeerFailed, PeerFolder
from quality import corpora, quality, quality_results, quality_table
from result_table import Result, document, table, write_document
from text_cases import end_to_end_case, fingerprint_cases, index_case

from slmfast.errors import UserError

LEAST_ROWS = 1000
CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sizes:
    """Rows of each case; of the prompts how many times over."""

    prompts: int
    join: int
    large: tuple[int, ...]
    texts: int
    index: int


QUICK = Sizes(prompts=1, join=200_000, large=(5_000_000,), texts=100_000, index=200_000)
FULL = Sizes(prompts=4, join=5_000_000, large=(100_000_000, 200_000_000), texts=5_000_000, index=50_000_000)


def _large(context: Context, sizes: Sizes) -> Iterator[Result]:
    for n in sizes.large:
        yield from large_case(context, n)


def _quality(context: Context, sizes: Sizes) -> Iterator[Result]:
    for corpus in corpora(context):
        rows = list(quality(context, corpus))
        print(f"quality\n{quality_table(rows)}\n", flush=True)
        yield from quality_results(rows)


CASES: dict[str, Callable[[Context, Sizes], Iterator[Result]]] = {
    "fingerprints": lambda context, sizes: fingerprint_cases(context, sizes.prompts),
    "join": lambda context, sizes: join_cases(context, sizes.join),
    "k8": lambda context, sizes: k8_case(context, sizes.join),
    "large": _large,
    "end-to-end": lambda context, sizes: end_to_end_case(context, sizes.texts),
    "index": lambda context, sizes: index_case(context, sizes.index),
    "quality": _quality,
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="slmfast bench dedup", description=__doc__.partition("\n")[0])
    options.add_argument("--case", action="append", choices=CASES, help="a case (may be repeated; default: all)")
    options.add_argument("--full", action="store_true", help="the sizes of the project's targets")
    options.add_argument("--n", type=int, help="fingerprints in a join (default 200000; with --full 5000000)")
    options.add_argument("--large-n", type=int, help="fingerprints of the join whose memory is measured")
    options.add_argument("--texts", type=int, help="short texts deduplicated from end to end")
    options.add_argument("--index-rows", type=int, help="rows of the index before 1 %% is appended")
    options.add_argument("--k", type=int, default=3, choices=range(9), help="Hamming distance (default 3)")
    options.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="threads on both sides")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--peers", type=Path, default=CHECKOUT / ".peers", help="the peers' folder (default .peers)")
    options.add_argument("--peer-seconds", type=float, default=120, help="longest run expected of a peer (default 120)")
    options.add_argument("--install-peers", action="store_true", help="install the peers, and measure nothing")
    options.add_argument("--out", type=Path, help="a file for the line of JSON")
    return options


def chosen_sizes(options: argparse.Namespace) -> Sizes:
    """The sizes that the options ask for.

    Raises:
        UserError: a size is too small to measure.
    """
    usual = FULL if options.full else QUICK
    for flag in ("n", "large_n", "texts", "index_rows"):
        value = getattr(options, flag)
        if value is not None and value < LEAST_ROWS:
            raise UserError(f"--{flag.replace('_', '-')} must be at least {LEAST_ROWS}, not {value}")
    return Sizes(
        prompts=usual.prompts,
        join=options.n or usual.join,
        large=(options.large_n,) if options.large_n else usual.large,
        texts=options.texts or usual.texts,
        index=options.index_rows or usual.index,
    )


def install(peers: PeerFolder) -> int:
    """Installs what is missing; 1 if any of it failed."""
    failures = 0
    for peer in peers.missing():
        print(f"installing {peer.package} {peer.version} into {peers.folder / peer.package}", flush=True)
        try:
            peers.install(peer)
        except PeerFailed as failure:
            print(f"slmfast: {failure}", file=sys.stderr)
            failures += 1
    print(f"{len(PEERS) - len(peers.missing())} of {len(PEERS)} peers are installed in {peers.folder}")
    return 1 if failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases; 1 if any answer that should be the same was not, or if our own side failed.

    Raises:
        UserError: an option is out of range.
    """
    options = parser().parse_args(argv)
    sizes = chosen_sizes(options)
    if options.threads < 1 or options.peer_seconds <= 0:
        raise UserError("--threads and --peer-seconds must be above 0")
    peers = PeerFolder(options.peers.absolute(), options.peer_seconds)
    if options.install_peers:
        return install(peers)
    context = Context(k=options.k, threads=options.threads, seed=options.seed, peers=peers)
    results = run_cases(context, sizes, options.case or list(CASES))
    for failure in context.failures:
        print(f"no figure: {failure}")
    missing = ", ".join(peer.package for peer in peers.missing())
    if missing:
        print(f"not installed, so not measured: {missing}; slmfast bench dedup --install-peers brings them in")
    text = document("dedup", options.threads, results)
    if options.out:
        write_document(options.out, text)
    print(text)
    differs = any(result.same_answer is False for result in results)
    return 1 if differs or context.broken else 0


def run_cases(context: Context, sizes: Sizes, names: Sequence[str]) -> list[Result]:
    """Runs cases in the order of CASES and prints each one's table when it is done.

    A case that fails keeps the rows it has, is noted in the context, and does not keep the others from running.
    """
    results: list[Result] = []
    for name, case in CASES.items():
        if name in names:
            rows: list[Result] = []
            try:
                for row in case(context, sizes):
                    rows.append(row)
            except Exception as error:  # whatever it is, hours of figures must not be lost with it
                traceback.print_exc()
                context.fail_ourselves(name, f"{type(error).__name__}: {error}".splitlines()[0])
            results += rows
            if rows and name != "quality":  # which prints a table of its own
                print(f"{name}\n{table(rows)}\n", flush=True)
    return results


if __name__ == "__main__":
    from slmfast.cli import main as command_line

    raise SystemExit(command_line(["bench", "dedup", *sys.argv[1:]]))  # user errors become one line there
