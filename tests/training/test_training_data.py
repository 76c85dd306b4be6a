"""Rows to ids, groups and the order of the epochs; what bad rows say."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast.errors import UserError
from slmfast.training.data import StepOrder, load_tokens, make_groups, rotated, tokenize
from slmfast.training.loading import load_tokenizer
from slmfast.training.settings import TrainSettings

SFT = TrainSettings(method="sft", learning_rate=1e-3)
KTO = TrainSettings(method="kto", learning_rate=1e-3)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def user(text):
    return [{"role": "user", "content": text}]


def reply(text):
    return [{"role": "assistant", "content": text}]


def test_the_completion_is_the_rest_of_the_template(tokenizer):
    prompt, completion = tokenize(tokenizer, user("1+1?"), reply("2"))
    assert tokenizer.decode(prompt) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(completion) == "2<|im_end|>\n"


def test_rows_keep_their_order_and_labels(tokenizer, kto_set):
    tokens = load_tokens(kto_set, tokenizer, KTO)
    assert len(tokens) == 21 and tokens.skipped == 0
    assert tokens.labels.tolist() == [i % 3 != 2 for i in range(21)]
    assert "question 7:" in tokenizer.decode(tokens.prompts[7])


def test_a_folder_of_shards_is_one_set(tokenizer, sft_set, tmp_path):
    table = pq.read_table(sft_set)
    folder = tmp_path / "shards"
    folder.mkdir()
    pq.write_table(table.slice(0, 9), folder / "part-00000.parquet")
    pq.write_table(table.slice(9), folder / "part-00001.parquet")
    whole, parts = load_tokens(sft_set, tokenizer, SFT), load_tokens(folder, tokenizer, SFT)
    assert [ids.tolist() for ids in whole.completions] == [ids.tolist() for ids in parts.completions]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completion": [reply("a"), reply("  "), reply("b")]}, "row 1: the completion is empty"),
        ({"completion": [reply("a"), None, reply("b")]}, "row 1: the completion is empty"),
        ({"prompt": [user("a"), user("b"), []]}, "row 2: the prompt is not a list"),
        ({"label": [True, None, False]}, "row 1: the label is None"),
        ({"label": [True, True, True]}, "no undesirable reply"),
        ({"label": [False, False, False]}, "no desirable reply"),
    ],
)
def test_a_bad_row_is_named(tokenizer, make_set, columns, message):
    with pytest.raises(UserError, match=message):
        load_tokens(make_set(3, labels=True, **columns), tokenizer, KTO)


def test_a_missing_column_and_a_missing_file_are_named(tokenizer, sft_set, tmp_path):
    with pytest.raises(UserError, match="no column 'label'"):
        load_tokens(sft_set, tokenizer, KTO)
    with pytest.raises(UserError, match="holds no Parquet files"):
        load_tokens(tmp_path / "nowhere", tokenizer, SFT)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match="can't be read as Parquet"):
        load_tokens(tmp_path / "broken.parquet", tokenizer, SFT)


def test_an_empty_set_is_refused(tokenizer, tmp_path, sft_set):
    pq.write_table(pq.read_table(sft_set).slice(0, 0), tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="no row to train on"):
        load_tokens(tmp_path / "empty.parquet", tokenizer, SFT)


def test_a_label_column_of_0_and_1_serves(tokenizer, kto_set, tmp_path):
    table = pq.read_table(kto_set)
    numbers = pa.array([int(label) for label in table["label"].to_pylist()])
    pq.write_table(table.set_column(2, "label", numbers), tmp_path / "numbers.parquet")
    tokens = load_tokens(tmp_path / "numbers.parquet", tokenizer, KTO)
    assert tokens.labels.tolist() == table["label"].to_pylist()


def window(settings: TrainSettings, **changes) -> TrainSettings:
    return TrainSettings(method=settings.method, learning_rate=1e-3, **changes)


def test_a_long_row_is_refused_or_skipped_and_never_cut(tokenizer, make_set):
    prompts = [user("short"), user("long " * 40), user("short")]
    data = make_set(3, prompt=prompts)
    with pytest.raises(UserError, match=r"row 1 has .* over the window of 100 .*, or set too_long to skip"):
        load_tokens(data, tokenizer, window(SFT, max_length=100))
    tokens = load_tokens(data, tokenizer, window(SFT, max_length=100, too_long="skip"))
    assert len(tokens) == 2 and tokens.skipped == 1
    assert all(tokenizer.decode(ids).endswith("<|im_start|>assistant\n") for ids in tokens.prompts)


def test_a_kl_pair_over_the_window_is_left_out_too(tokenizer, make_set):
    """Row 1 fits with its own short reply, but not with the long reply of row 0 that it would be paired with."""
    prompts = [user("a"), user("b" * 60), user("c"), user("d")]
    replies = [reply("long " * 15), reply("x"), reply("y"), reply("z")]
    data = make_set(4, prompt=prompts, completion=replies, label=[True, False, True, False])
    with pytest.raises(UserError, match="KL pair of kept rows 1 and 0"):
        load_tokens(data, tokenizer, window(KTO, max_length=140))
    tokens = load_tokens(data, tokenizer, window(KTO, max_length=140, too_long="skip"))
    assert len(tokens) == 3 and tokens.skipped == 1
    for group in make_groups(len(tokens), 4):
        for row, other in zip(group, rotated(group), strict=True):
            assert len(tokens.prompts[row]) + len(tokens.completions[other]) <= 140


@pytest.mark.parametrize("rows", range(1, 20))
def test_groups_hold_each_row_once_and_none_is_alone(rows):
    groups = make_groups(rows, 4)
    assert [row for group in groups for row in group] == list(range(rows))
    assert all(len(group) >= 2 for group in groups) or rows == 1
    assert all(len(group) <= 5 for group in groups)


def test_rotation_pairs_each_prompt_with_the_reply_before_it():
    assert rotated(range(4, 8)) == [7, 4, 5, 6]


@pytest.mark.parametrize(("groups", "accumulation", "epochs"), [(7, 3, 4), (6, 3, 2), (2, 5, 3)])
def test_every_epoch_takes_every_group_once(groups, accumulation, epochs):
    order = StepOrder(groups, accumulation, epochs, seed=5)
    per_epoch = -(-groups // accumulation)
    assert len(order) == per_epoch * epochs
    for epoch in range(epochs):
        steps = [order[epoch * per_epoch + i] for i in range(per_epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(groups))
        assert all(len(step) <= accumulation for step in steps)


def test_the_order_is_a_function_of_seed_and_step():
    first, again, other = (StepOrder(40, 8, 3, seed) for seed in (1, 1, 2))
    assert np.concatenate([first[i] for i in range(5)]).tolist() == list(range(40))  # the file's order at first
    assert all((first[i] == again[i]).all() for i in reversed(range(15)))
    assert any((first[i] != other[i]).any() for i in range(5, 15))
    assert any((first[i] != first[i + 5]).any() for i in range(5, 10))  # epochs differ
