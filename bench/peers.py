"""The named peers: one virtual environment each, because their packages collide, and one process a measurement.

`simhash` and `simhash-pybind` both import as `simhash`; data-juicer pins much besides. So each lives under
`.peers/<package>/`, made by `slmfast bench dedup --install-peers`, and runs its script of bench/peer_scripts, which
reads files that we wrote, times its own hot call and writes its answer. Both sides thus run on one host in one run.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCRIPTS = Path(__file__).parent / "peer_scripts"
_COMMON = ("numpy", "pyarrow")


@dataclass(frozen=True)
class Peer:
    """A package by somebody else, in the version that is measured."""

    package: str
    version: str
    title: str
    """What the table calls it; says so where it has one thread only."""
    script: str
    """File of bench/peer_scripts."""
    install: tuple[tuple[str, ...], ...]
    """What pip installs, in this order."""
    one_thread: bool = False
    """Whether it can't use more than one thread, so that ours is measured on one as well."""


def _peer(package: str, version: str, title: str, script: str, *before: tuple[str, ...]) -> Peer:
    install = (*before, (*_COMMON, f"{package}=={version}"))
    return Peer(package, version, title, script, install, one_thread="(1 thread)" in title)


SIMHASH_PYBIND = _peer("simhash-pybind", "0.0.3", "simhash-pybind find_all (1 thread)", "simhash_pybind.py")
FAISS = _peer("faiss-cpu", "1.15.1", "faiss IndexBinaryMultiHash", "faiss_cpu.py")
SIMHASH = _peer("simhash", "2.1.2", "simhash (1 thread)", "simhash_md5.py")
GAOYA = _peer("gaoya", "0.2.2", "gaoya", "gaoya_rust.py")
# The operator needs simhash-pybind, and its package imports aiohttp and ray without asking pip for them.
DATA_JUICER = _peer(
    "py-data-juicer",
    "1.6.1",
    "data-juicer document_simhash_deduplicator",
    "data_juicer_operator.py",
    ("torch==2.13.0",),
    ("simhash-pybind==0.0.3", "aiohttp==3.14.5", "ray==2.60.0"),
)
PEERS = (SIMHASH_PYBIND, FAISS, SIMHASH, GAOYA, DATA_JUICER)


def _pins(peer: Peer) -> str:
    return "\n".join(" ".join(packages) for packages in peer.install)


class PeerFailed(Exception):
    """A peer crashed, ran out of time or broke the protocol; the message says which, in one line."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What one process of a peer gave."""

    seconds: float
    """Wall time of its hot call."""
    version: str
    peak_bytes: int
    """Its greatest resident memory, the preparation included."""
    value: np.ndarray


class PeerFolder:
    """The environments of all peers, under one folder."""

    def __init__(self, folder: Path, limit: float = 120.0) -> None:
        """`limit`: seconds that the hot call of a peer may take; its process is killed at twice that and a minute."""
        self.folder, self.limit = folder, limit

    def python(self, peer: Peer) -> Path:
        """The interpreter of a peer's environment."""
        return self.folder / peer.package / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def has(self, peer: Peer) -> bool:
        """Whether the peer's installation ended well, with the versions that are pinned here."""
        done = self._done(peer)
        return done.exists() and done.read_text(encoding="utf-8") == _pins(peer)

    def _done(self, peer: Peer) -> Path:
        return self.folder / peer.package / ".installed"

    def missing(self) -> list[Peer]:
        """The peers that are not installed."""
        return [peer for peer in PEERS if not self.has(peer)]

    def install(self, peer: Peer) -> None:
        """Makes the environment of a peer.

        Raises:
            PeerFailed: with the last line of what pip said.
        """
        self._done(peer).unlink(missing_ok=True)
        _checked([sys.executable, "-m", "venv", str(self.folder / peer.package)], peer)
        for packages in peer.install:
            _checked([str(self.python(peer)), "-m", "pip", "install", "--quiet", *packages], peer)
        self._done(peer).write_text(_pins(peer), encoding="utf-8")

    def ask(self, peer: Peer, task: str, source: np.ndarray | pa.ChunkedArray, settings: Mapping[str, Any]) -> Answer:
        """Runs one task in the peer's environment; source is fingerprints uint64[n] or a column of texts."""
        return ask(self.python(peer), SCRIPTS / peer.script, task, source, settings, timeout=2 * self.limit + 60)


def ask(
    python: Path,
    script: Path,
    task: str,
    source: np.ndarray | pa.ChunkedArray,
    settings: Mapping[str, Any],
    *,
    timeout: float,
) -> Answer:
    """Runs one task of a script in a process of its own.

    Raises:
        PeerFailed: it took longer than `timeout` seconds (it and its children are killed), crashed, or did not end
            with its line of JSON.
    """
    with tempfile.TemporaryDirectory(prefix="slmfast-bench-") as scratch:
        folder = Path(scratch)
        output = folder / "answer.npy"
        request = {"task": task, "input": str(_written(source, folder)), "output": str(output), **settings}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        printed = _run([str(python), str(script), str(folder / "request.json")], script.name, timeout, folder)
        try:
            line = json.loads(printed.splitlines()[-1])
            value = np.load(output, allow_pickle=False)
            return Answer(float(line["seconds"]), str(line["version"]), int(line["peak_bytes"]), value)
        except (IndexError, KeyError, TypeError, ValueError, OSError) as error:
            raise PeerFailed(f"{script.name} gave no answer that can be read ({error!r})") from error


def _written(source: np.ndarray | pa.ChunkedArray, folder: Path) -> Path:
    if isinstance(source, np.ndarray):
        np.save(folder / "input.npy", source)
        return folder / "input.npy"
    table = pa.table({"text": source})
    with pa.OSFile(str(folder / "input.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return folder / "input.arrow"


def _run(command: Sequence[str], name: str, timeout: float, folder: Path) -> str:
    # Through files and not pipes, so that a grandchild which outlives its parent can't hold us up.
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, start_new_session=True)
        try:
            code = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: its children go too
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise PeerFailed(f"{name} was stopped after {timeout:.0f} s: no answer by then") from None
            raise
    if code != 0:
        said = (folder / "err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise PeerFailed(f"{name} ended with code {code}: {said[-1] if said else 'it said nothing'}")
    return (folder / "out").read_text(encoding="utf-8", errors="replace")


def _checked(command: Sequence[str], peer: Peer) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerFailed(f"{peer.package} can't be installed: {said[-1] if said else 'pip said nothing'}")
