"""The native module under gcc's sanitizers: its tests on every instruction set, the fuzzer, and its threads.

    python tests/sanitize/run.py [--inputs N] [--fuzz-only]        (make sanitize [FUZZ=N])

Two instrumented copies of the package are built under build/sanitize, never over the one in use: one with
AddressSanitizer and UndefinedBehaviorSanitizer, one with ThreadSanitizer. Python itself stays as it is, so the
sanitizer's library is loaded before everything else, and libstdc++ with it, or C++ exceptions would pass the sanitizer
by. Leaks are not looked for: CPython frees little at its end. Before anything is believed, a planted fault must be
found in the same way.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitize"
TESTS = "simhash near_pairs clusters dedup dedup_parallel dedup_index index_file index_native arrow_texts isa".split()
# AddressSanitizer keeps freed memory and shadows all of it, so a measure of memory means nothing under it.
LEFT_OUT = "not takes_no_memory"
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
RUNTIMES = {"address": ["asan", "ubsan"], "thread": ["tsan"]}
OPTIONS = {
    "PYTHONMALLOC": "malloc",  # Python's own allocator would hide where an object's memory ends
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "1",
}
PLANTED = {
    "use after free": (
        "address",
        "AddressSanitizer: heap-use-after-free",
        "char* a = new char[8]; delete[] a; return *a;",
    ),
    "wide shift": ("address", "runtime error: shift exponent", 'return 1 << std::atoi("40");'),
    "race": (
        "thread",
        "ThreadSanitizer: data race",
        "int a = 0; std::thread t([&] { ++a; }); ++a; t.join(); return a;",
    ),
}


def build(kind: str) -> Path:
    """An instrumented copy of the package; returns the folder to put on Python's path."""
    folder = BUILD / kind
    command = ["setup.py", "-q", "build", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    environment = os.environ | {"SLMFAST_SANITIZE": SANITIZERS[kind]}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(
            f"the build with -fsanitize={SANITIZERS[kind]} failed; gcc's sanitizer libraries are needed:\n{done.stderr}"
        )
    return folder / "lib"


def library(name: str) -> str:
    """Where gcc keeps a shared library of its own; just its name where there is none."""
    command = ["g++", f"-print-file-name=lib{name}.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def missing() -> str | None:
    """Why the sanitizers cannot run here, or None."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    absent = [name for name in ("asan", "ubsan", "tsan") if not Path(library(name)).is_absolute()]
    return f"gcc's sanitizer libraries are missing: {', '.join(absent)}" if absent else None


def environment(kind: str, **more: str) -> dict[str, str]:
    """The environment in which Python runs an instrumented library."""
    preload = " ".join(library(name) for name in [*RUNTIMES[kind], "stdc++"])
    return os.environ | OPTIONS | {"LD_PRELOAD": preload, "PYTHONPATH": str(BUILD / kind / "lib")} | more


def find_planted_faults(kinds: list[str]) -> None:
    """Ends the program unless each kind of fault is found where one is planted."""
    for name, (kind, expected, body) in PLANTED.items():
        if kind not in kinds:
            continue
        source = BUILD / kind / f"planted_{name.replace(' ', '_')}.cpp"
        source.write_text(f'#include <cstdlib>\n#include <thread>\nextern "C" int fault() {{ {body} }}\n')
        flags = [f"-fsanitize={SANITIZERS[kind]}", "-fno-sanitize-recover=all", "-O1", "-g", "-shared", "-fPIC"]
        shared = source.with_suffix(".so")
        subprocess.run(["g++", *flags, source, "-o", shared], check=True)
        code = f"import ctypes; print(ctypes.CDLL({str(shared)!r}).fault())"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment(kind), capture_output=True, text=True, check=False)
        if done.returncode == 0 or expected not in done.stderr:
            sys.exit(f"the planted fault {name!r} was not found, so nothing else would be:\n{done.stderr}")
    print(f"planted faults found: {', '.join(n for n, (kind, *_) in PLANTED.items() if kind in kinds)}", flush=True)


def run(title: str, kind: str, *command: object, **more: str) -> None:
    """Runs one part, away from the checkout so that the instrumented copy is the one imported."""
    print(f"-- {title}", flush=True)
    env = environment(kind, **more)
    done = subprocess.run([sys.executable, *map(str, command)], env=env, cwd=BUILD, check=False)
    if done.returncode:
        sys.exit(f"{title}: exit code {done.returncode}")


def instruction_sets() -> list[str]:
    """What this machine can be forced to."""
    code = "from slmfast import _native; print(_native.__file__, *_native.available_isas())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment("address"), cwd=BUILD, capture_output=True, text=True, check=True)
    path, *names = done.stdout.split()
    if not Path(path).is_relative_to(BUILD):
        sys.exit(f"the module that was imported, {path}, is not the instrumented one")
    return names


def pytest(*arguments: str) -> list[object]:
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000, help="how many inputs to fuzz")
    parser.add_argument("--fuzz-only", action="store_true", help="without the tests and the threads")
    settings = parser.parse_args()
    if why := missing():
        sys.exit(f"{why}: install gcc with its sanitizers (Debian: g++ brings them)")
    kinds = ["address"] if settings.fuzz_only else ["address", "thread"]
    for kind in kinds:
        build(kind)
    find_planted_faults(kinds)
    names = instruction_sets()
    fuzz = Path(__file__).with_name("fuzz_native.py")
    if not settings.fuzz_only:
        for isa in names:
            run(f"tests on {isa}, address and undefined", "address", *pytest("-k", LEFT_OUT), SLMFAST_ISA=isa)
        run("tests of threads, thread", "thread", *pytest("-k", "thread or budget or bound"))
        run("fuzzer, thread", "thread", fuzz, "--inputs", max(1, settings.inputs // 50), "--seed", 1)
    run("fuzzer, address and undefined", "address", fuzz, "--inputs", settings.inputs)


if __name__ == "__main__":
    main()
