"""How many tokens a stage scores together, the same over all its units and restarts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmfast.engines.base import Engine
from slmfast.store import read_json, write_json


class TokenBudget:
    """How many tokens are scored together: chosen once, kept beside the units that are done, and so the same after a
    restart whatever memory is free then.

    Where the memory does not hold that many after all, they are halved, and the unit is scored again as a whole: a run
    that was broken off in between does the same.

    Args:
        work: the folder of the stage's partial work, which goes when the stage is done.
        tokens: what the recipe says; what the memory holds unless given.
    """

    def __init__(self, work: Path, engine: Engine, tokens: int | None = None):
        self.engine, self.path = engine, work / "token_budget.json"
        self.notes = read_json(self.path) if self.path.exists() else {"token_budget": tokens}
        engine.token_budget = self.notes["token_budget"]

    def keep(self, score: Callable[[Engine, list[Any]], list[Any]], rows: list[Any]) -> list[Any]:
        """The scores of a unit, all made with one budget."""
        if not self.path.exists():
            self.notes |= {"token_budget": self.engine.fix_token_budget(), "out_of_memory": 0}
            write_json(self.path, self.notes)
        while True:
            scored = score(self.engine, rows)
            if self.engine.token_budget == self.notes["token_budget"]:
                return scored
            halvings = self.notes["out_of_memory"] + 1
            self.notes |= {"token_budget": self.engine.token_budget, "out_of_memory": halvings}
            write_json(self.path, self.notes)
