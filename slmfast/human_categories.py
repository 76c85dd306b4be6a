"""How the rules' categories stand for those that people gave to two datasets, by data/human_categories.yaml."""

import functools
from collections.abc import Iterable
from importlib import resources

import yaml

ALIASES = {"general_qa": "open_qa"}  # Dolly's; no text tells the two apart


@functools.cache
def human_classes(dataset: str) -> dict[str, str]:
    """The class of `dataset`, "belle" or "dolly", that each of our categories stands for; some stand for none."""
    return {ours: human for human, categories in _mappings()[dataset].items() for ours in categories}


def dataset_of(classes: Iterable[str]) -> str | None:
    """The dataset that knows all of these classes, or None."""
    found = set(classes)
    return next((name for name, mapped in _mappings().items() if found and found <= set(mapped)), None)


def plain_class(name: str) -> str:
    """A class as the mappings write it: plain spaces, and one name where a dataset has two for the same."""
    name = " ".join(name.split())
    return ALIASES.get(name, name)


@functools.cache
def _mappings() -> dict[str, dict[str, list[str]]]:
    return yaml.safe_load((resources.files("slmfast") / "data" / "human_categories.yaml").read_text(encoding="utf-8"))
