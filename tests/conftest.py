"""What the tests share: where real data lies, if anywhere, and a browser."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --dump-dom"
)
PROBE = (
    "<script>function look() { const d = f.contentDocument; const r = d.documentElement;"
    "const flat = [...d.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 60).length;"
    "document.title = r.scrollWidth + ' ' + r.clientWidth + ' ' + d.querySelectorAll('svg').length + ' ' + flat; }"
    "</script><iframe id=f onload=look() src=page.html style='width:{width}px;height:3000px;border:0'></iframe>"
)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files, named by SLMFAST_DATA; the test skips without it."""
    folder = os.environ.get("SLMFAST_DATA")
    if not folder:
        pytest.skip("SLMFAST_DATA is not set: it names the folder of the real data files")
    return Path(folder)


@pytest.fixture
def browser(tmp_path: Path) -> Callable[[str, int], tuple[int, ...]]:
    """Opens a page in headless Chromium, in a frame of some width, which tells how wide its content is.

    Gives the content's and the frame's width, the number of drawings, and that of flat ones; a word on the browser's
    console fails the test. Skips without a Chromium.
    """
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")

    def look(text: str, width: int) -> tuple[int, ...]:
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        (tmp_path / "frame.html").write_text(PROBE.replace("{width}", str(width)))
        command = [BROWSER, *QUIET.split(), f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run(
            [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=300, check=True
        )
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return tuple(map(int, re.search(r"<title>([\d ]+)</title>", done.stdout).group(1).split()))

    return look
