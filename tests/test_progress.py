"""The progress line: rate and time left of this run's own work."""

import pytest

from slmfast import progress
from slmfast.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: clock[0], in seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_what_an_earlier_run_did_does_not_count_for_the_rate(clock, capsys):
    shown = Progress("regenerate", 1000, about=lambda: "large: 7 replies")
    shown.skip(800)
    clock[0] = 20.0
    shown.add(100)
    assert capsys.readouterr().err == "regenerate: 900/1,000 rows, 5.00/s, 0:00:20 left; large: 7 replies\n"


def test_the_line_comes_now_and_then_while_nothing_is_done(clock, capsys):
    shown = Progress("rate", 10)
    for second in range(40):
        clock[0] = float(second)
        shown.show()
    assert capsys.readouterr().err.splitlines() == ["rate: 0/10 rows, 0.00/s"] * 2
