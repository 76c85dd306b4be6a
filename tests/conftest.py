"""What the tests share: where real data lies, if anywhere."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files, named by SLMFAST_DATA; the test skips without it."""
    folder = os.environ.get("SLMFAST_DATA")
    if not folder:
        pytest.skip("SLMFAST_DATA is not set: it names the folder of the real data files")
    return Path(folder)
