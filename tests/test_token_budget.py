"""The tokens that a stage scores together are chosen once and stay what they were."""

import json

from slmfast.token_budget import TokenBudget


class Engine:
    """Scores a unit with the budget that it has, and has too little memory for the first few units."""

    def __init__(self, free, shortages=0):
        self.free, self.shortages, self.token_budget = free, shortages, None

    def fix_token_budget(self):
        self.token_budget = self.token_budget or self.free
        return self.token_budget


def score(engine, rows):
    if engine.shortages:
        engine.shortages -= 1
        engine.token_budget //= 2
    return [(row, engine.token_budget) for row in rows]


def test_it_is_chosen_at_the_first_unit_and_kept_over_a_restart(tmp_path):
    assert TokenBudget(tmp_path, Engine(free=4096)).keep(score, [1]) == [(1, 4096)]
    again = TokenBudget(tmp_path, Engine(free=512))
    assert again.keep(score, [2]) == [(2, 4096)]
    assert again.notes == {"token_budget": 4096, "out_of_memory": 0}
    assert json.loads((tmp_path / "token_budget.json").read_text()) == again.notes


def test_a_unit_that_ran_out_of_memory_is_scored_again_as_a_whole(tmp_path):
    budget = TokenBudget(tmp_path, Engine(free=4096, shortages=2))
    assert budget.keep(score, [1, 2]) == [(1, 1024), (2, 1024)]
    assert budget.notes == {"token_budget": 1024, "out_of_memory": 2}
    assert TokenBudget(tmp_path, Engine(free=9999)).keep(score, [3]) == [(3, 1024)]


def test_the_recipe_may_say(tmp_path):
    assert TokenBudget(tmp_path, Engine(free=4096), 300).keep(score, [1]) == [(1, 300)]
