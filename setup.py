"""Builds the one native module, slmfast._native; everything else about the package stands in pyproject.toml.

The packages are listed by hand: automatic discovery would also take the top-level folder `kernels/`, and an
importable `kernels` shadows the third-party package of that name that transformers imports.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

FLAGS = ["-O3"]
LINK_FLAGS: list[str] = []
# SLMFAST_SANITIZE=address,undefined (or thread) instruments the native module; tests/sanitize/run.py sets it.
if sanitizers := os.environ.get("SLMFAST_SANITIZE"):
    LINK_FLAGS = [f"-fsanitize={sanitizers}"]
    FLAGS = [*LINK_FLAGS, "-DSLMFAST_SMALL_JOINS", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]

setup(
    packages=[
        "slmfast",
        "slmfast.commands",
        "slmfast.engines",
        "slmfast.evaluation",
        "slmfast.kernels",
        "slmfast.miniature",
        "slmfast.readers",
        "slmfast.reporting",
        "slmfast.scoring",
        "slmfast.stages",
        "slmfast.study",
        "slmfast.training",
    ],
    package_data={
        "slmfast": ["py.typed", "data/*.yaml"],
        "slmfast.miniature": ["*.yaml", "tasks/*.yaml", "models/*.json", "models/*/*"],
    },
    ext_modules=[
        Pybind11Extension(
            "slmfast._native",
            sorted(str(source) for source in Path("csrc").glob("*.cpp")),
            include_dirs=["csrc"],
            depends=sorted(str(header) for header in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=[*FLAGS, "-fvisibility=hidden", "-Wall", "-Wextra"],
            extra_link_args=LINK_FLAGS,
        )
    ],
)
