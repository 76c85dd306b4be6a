"""What scoring takes: columns of every make give the lists' scores, and what can't be scored is one line."""

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import slmfast
from slmfast import UserError

PROMPTS = ["What is 17 times 3?", "the fox", "?"]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
REPLIES = [["51", None, "no"], ["jumps"], []]
OWN = [["yes", "no"], ["0", "0.5", "1"], ["fox"]]
MAKES = {
    "pyarrow": pa.array,
    "chunked": lambda values: pa.chunked_array([pa.array(values[:1]), pa.array(values[1:], pa.array(values).type)]),
    "polars": lambda values: pl.Series("a", values),
    "pandas objects": lambda values: pd.Series(values),
    "pandas Arrow": lambda values: pd.Series(values, dtype=pd.ArrowDtype(pa.array(values).type)),
    "datasets": lambda values: datasets.Dataset.from_dict({"a": values})["a"],
    "numpy": lambda values: np.array([*values, None], dtype=object)[:-1],
    "scalars": lambda values: [pa.scalar(value) for value in values],
}


@pytest.fixture
def read_back(tmp_path):
    """A column as pandas reads it from Parquet: lists come as numpy arrays."""

    def read(values):
        pq.write_table(pa.table({"a": values}), tmp_path / "a.parquet")
        return pd.read_parquet(tmp_path / "a.parquet")["a"]

    return read


@pytest.mark.parametrize("make", [*MAKES, "pandas from Parquet"])
def test_columns_of_every_make(make, model, tokenizer, read_back):
    column = MAKES.get(make, read_back)
    expected = slmfast.perplexity(model, tokenizer, PROMPTS, REPLIES, progress=False)
    assert slmfast.perplexity(model, tokenizer, column(PROMPTS), column(REPLIES), progress=False).equals(expected)
    assert slmfast.perplexity(model, tokenizer, column(MESSAGES), column(REPLIES), progress=False).equals(expected)
    together = slmfast.choose(model, tokenizer, PROMPTS, ["yes", "no"], progress=False)
    found = slmfast.choose(model, tokenizer, column(PROMPTS), column(["yes", "no"]), progress=False)
    np.testing.assert_array_equal(found, together)
    apart = slmfast.choose(model, tokenizer, PROMPTS, OWN, progress=False)
    for own, other in zip(slmfast.choose(model, tokenizer, PROMPTS, column(OWN), progress=False), apart, strict=True):
        np.testing.assert_array_equal(own, other)


def test_a_null_list_has_no_replies_and_a_null_prompt_is_named(model, tokenizer):
    found = slmfast.perplexity(model, tokenizer, PROMPTS, pa.array([["51"], None, ["!"]]), progress=False)
    assert found["prompt_index"].to_pylist() == [0, 2]
    with pytest.raises(UserError, match="prompt 1 is null: leave it out"):
        slmfast.perplexity(model, tokenizer, ["a", None], [["b"], ["c"]], progress=False)


def test_texts_with_pandas_nulls(model, tokenizer):
    found = slmfast.perplexity(model, tokenizer, ["a"], [["b", float("nan")]], progress=False)
    assert found["bits"].null_count == 1


def test_a_tokenizer_of_another_model_is_named(build_model, tokenizer):
    small = build_model(vocab_size=40)
    with pytest.raises(UserError, match=r"gives a token \d+, and the model knows 40: pass the model's own one"):
        slmfast.perplexity(small, tokenizer, ["What is it?"], [["yes"]], progress=False)


def test_a_folder_that_lacks_a_weight_is_refused(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    slmfast.perplexity(tmp_path / "whole", None, ["a"], [["b"]], progress=False)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    del weights["model.layers.1.input_layernorm.weight"]
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weight model.layers.1.input_layernorm.weight: give a complete"):
        slmfast.perplexity(tmp_path / "whole", None, ["a"], [["b"]], progress=False)


def test_wrong_models_and_devices_are_named(tokenizer, tmp_path, monkeypatch):
    for wrong in (None, 3):
        with pytest.raises(UserError, match="give a model, its folder's path or a hub name"):
            slmfast.perplexity(wrong, None, ["a"], [["b"]], progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="device is cuda, but torch sees no CUDA device"):
        slmfast.perplexity(tmp_path, tokenizer, ["a"], [["b"]], device="cuda", progress=False)


def test_a_choice_named_twice_is_said(model, tokenizer):
    with pytest.raises(UserError, match="'0' stands there twice"):
        slmfast.choose(model, tokenizer, ["a"], ["0", "1", "0"], progress=False)


def test_a_broken_configuration_is_not_the_tokenizers_fault(model, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"mend its config\.json"):
        slmfast.perplexity(tmp_path, None, ["a"], [["b"]], progress=False)
