"""Builds the one native module, slmfast._native; everything else about the package stands in pyproject.toml.

The packages are listed by hand: automatic discovery would also take the top-level folder `kernels/`, and an
importable `kernels` shadows the third-party package of that name that transformers imports.
"""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

setup(
    packages=[
        "slmfast",
        "slmfast.engines",
        "slmfast.kernels",
        "slmfast.miniature",
        "slmfast.readers",
        "slmfast.reporting",
        "slmfast.scoring",
        "slmfast.stages",
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
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
        )
    ],
)
