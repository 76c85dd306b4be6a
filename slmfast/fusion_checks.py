"""Whether models may be averaged though their tensors fit: one architecture, and one vocabulary.

Tensors of the same shapes may still mean different things: a row of the embedding stands for another token, or the
same matrix is cut into other heads. Their average would be of nothing, and would load without a word.
"""

import filecmp
import json
from pathlib import Path
from typing import Any

from slmfast.errors import UserError
from slmfast.model_folder import ModelWeights, read_config

# What a config says of a model that no tensor's shape shows. A key that one of two configs lacks tells nothing.
_UNSEEN = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
)
_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")  # where they lie, the first that both models have


def check_same_kind(first: Path, other: Path) -> None:
    """A UserError that names the first thing, beside tensors, by which two models are of different kinds."""
    one, two = read_config(first), read_config(other)
    for key in _UNSEEN:
        if key in one and key in two and one[key] != two[key]:
            raise UserError(
                f"config.json's {key} is {one[key]!r} in {first} and {two[key]!r} in {other}: take models of one "
                "architecture"
            )
    name = next((name for name in _TOKENIZERS if (first / name).is_file() and (other / name).is_file()), None)
    if name is None or filecmp.cmp(first / name, other / name, shallow=False):
        return
    differ = None if name.endswith(".json") else f"{name} differs"
    if differ is None:
        differ = _first_difference(_tokens(first / name), _tokens(other / name))
    if differ is not None:
        raise UserError(f"{first} and {other} have different vocabularies ({differ}): take models of one tokenizer")


def check_same_dtypes(first: ModelWeights, other: ModelWeights) -> None:
    """A UserError that names the first tensor whose type differs: one part is coarser than it looks, or was cast."""
    for name in first.names:
        one, two = (str(part.dtype(name)).removeprefix("torch.") for part in (first, other))
        if one != two:
            raise UserError(
                f"tensor {name} is {one} in {first.path} and {two} in {other.path}: save both in one type, or average "
                "them as they are with mixed_dtypes (--mixed-dtypes)"
            )


def _first_difference(one: dict[int, str], two: dict[int, str]) -> str | None:
    """The first id that stands for two tokens; tokens that one of them has beyond the other's are no matter."""
    for number in sorted(one.keys() & two.keys()):
        if one[number] != two[number]:
            return f"token {number} is {one[number]!r} and {two[number]!r}"
    return None


def _tokens(file: Path) -> dict[int, str]:
    """The token of every id: of a tokenizer.json by its model and what was added, of a vocab.json as it is."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "vocab.json":
            return {number: token for token, number in found.items()}
        vocabulary = found.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # of a Unigram model: tokens with their scores, in order
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        else:
            tokens = {number: token for token, number in vocabulary.items()}
        return tokens | {added["id"]: added["content"] for added in found.get("added_tokens", [])}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{file} is no tokenizer's file ({error}): fetch or save the model again") from error
