"""The package as users install it: wheel, sdist and editable, with no top-level `kernels` in any of them.

An importable `kernels` of ours would shadow the third-party package of that name that transformers imports.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parent.parent

PROBE = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
assert spec is None or "slmfast" not in str(spec), f"our kernels folder is importable: {spec}"
import slmfast
assert "torch" not in sys.modules, "import slmfast imports torch"
import slmfast.kernels.reference
from slmfast import _native
import slmfast.miniature
import numpy
assert len(slmfast.near_pairs(numpy.array([0, 1, 255], numpy.uint64))[0]) == 1
print(slmfast.__file__)
"""


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A clean copy of the source tree."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: it builds from a clean copy of the tracked files")
    target = tmp_path_factory.mktemp("checkout")
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    for name in filter(lambda name: (ROOT / name).exists() or (ROOT / name).is_symlink(), names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        run("cp", "-P", ROOT / name, target / name)
    return target


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment that sees this one's libraries but not its slmfast; gives its python."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    # A path in a .pth file is only added to sys.path: the .pth files there, such as an editable slmfast's, stay unread.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def install(python, *what):
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what)


def probe(python, folder):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return Path(run(python, "-c", PROBE, cwd=folder, env=clean))


@pytest.mark.slow
def test_wheel_from_sdist(checkout, environment, tmp_path):
    build = "from setuptools import build_meta; print(build_meta.build_sdist({!r}))"
    archive = tmp_path / run(sys.executable, "-c", build.format(str(tmp_path)), cwd=checkout).splitlines()[-1]
    listing = run("tar", "-tzf", archive).splitlines()
    assert not any("kernels/__init__.py" in name for name in listing)
    install(environment, archive)
    assert environment.parent.parent in probe(environment, tmp_path).parents


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """A wheel built on this machine."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, checkout)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel):
    """The wheel's contents, in a folder that can stand on Python's path."""
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.mark.slow
def test_wheel(wheel, environment, tmp_path):
    names = run(sys.executable, "-m", "zipfile", "-l", wheel).splitlines()
    assert not any(name.startswith("kernels/") for name in names)
    assert any(name.startswith("slmfast/kernels/reference.py") for name in names)
    install(environment, wheel)
    assert environment.parent.parent in probe(environment, tmp_path).parents


# Instructions that the baseline of x86-64 (SSE2) lacks and that need no AVX register: SSSE3, SSE4, POPCNT, BMI.
LATER = re.compile(
    r"pshufb|palignr|phadd|phsub|pabs[bwd]|psign|pmulhrsw|pmaddubsw|p?blend|pmov[sz]x|ptest|pcmp(eqq|gtq|[ei]str)"
    r"|pinsr[bdq]|pextr[bdq]|pmulld|pm(in|ax)(sb|sd|uw|ud)|packusdw|round[ps][sd]|crc32|popcnt|lzcnt|pext$|pdep|bzhi"
    r"|s(hl|hr|ar)x$|andn$|bls|mulx|rorx"
)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="looks for x86 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_newer_instructions_stand_only_in_functions_named_after_their_set(unpacked):
    (module,) = (unpacked / "slmfast").glob("_native*.so")
    listing = run("objdump", "-d", "-C", "--no-show-raw-insn", module)
    newer: dict[str, set[str]] = {}
    function = ""
    for line in listing.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = heading[1]
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line):
            name, operands = instruction.groups()
            if name.startswith("v") or LATER.match(name) or re.search(r"%[yz]mm|%k[0-7]", operands):
                newer.setdefault(function, set()).add(name)
    assert any("avx2" in name for name in newer) and any("avx512" in name for name in newer)
    assert {name: found for name, found in newer.items() if not re.search("_avx2|_avx512", name)} == {}


# OpenBLAS inside numpy takes some of these models for newer ones than they are; its own variable says otherwise.
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates x86 processors")
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (Debian: qemu-user)")
@pytest.mark.parametrize(("processor", "isa"), [("Nehalem", "scalar"), ("SandyBridge", "scalar"), ("Haswell", "avx2")])
def test_the_wheel_runs_on_an_emulated_older_processor(unpacked, processor, isa):
    libraries = Path(numpy.__file__).parents[1]
    clean = {key: value for key, value in os.environ.items() if key not in ("SLMFAST_ISA", "LD_PRELOAD")}
    environment = clean | {"PYTHONPATH": f"{unpacked}{os.pathsep}{libraries}", "OPENBLAS_CORETYPE": "Nehalem"}
    interpreter = Path(sys.executable).resolve()  # outside any virtual environment
    program = [interpreter, "-S", ROOT / "tests" / "near_duplicate_digests.py", "400", "1", "2"]
    here = json.loads(run(*program, env=environment))
    there = json.loads(run("qemu-x86_64", "-cpu", processor, *program, env=environment))
    assert there.pop("isa") == isa
    assert here.pop("isa") == _best_here()
    assert there == here and here["pairs"] > 1000


def _best_here() -> str:
    from slmfast import _native

    return _native.available_isas()[-1]


@pytest.mark.slow
def test_editable(checkout, environment, tmp_path):
    install(environment, "-e", checkout)
    assert checkout in probe(environment, tmp_path).parents


def test_import_is_light():
    code = "import sys, slmfast; print([m for m in ('torch', 'numpy', 'pyarrow', 'transformers') if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd="/") == "[]"


def test_every_public_name_exists():
    import slmfast

    for name in slmfast.__all__:
        assert getattr(slmfast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = slmfast.nonsense


def test_this_checkout_does_not_shadow_kernels():
    code = "import importlib.util as u; print(u.find_spec('kernels'))"
    assert str(ROOT) not in run(sys.executable, "-c", code, cwd="/")
