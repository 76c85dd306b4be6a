"""A tiny random Qwen2 with a byte-level tokenizer, and small training sets in TRL's format."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmfast.records import MESSAGE

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REPLIES = ["a cat", "seven", "no", "the quick brown fox", "x = 3 + 4", "你好", "yes, that is so", "blue"]


def save_tiny_model(folder: Path, seed: int, tied: bool = True, hidden: int = 32, spread: float = 0.1) -> Path:
    """Saves a random two-layer Qwen2 with grouped queries, fp32, and its tokenizer as a complete folder.

    Its weights have the standard deviation `spread` and lie on the bf16 grid where it is wider than usual, as published
    models do.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=spread,
    )
    model = Qwen2ForCausalLM(config)
    if hidden > 32:
        model.bfloat16().float()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_set(path: Path, rows: int, labels: bool = False, **columns: list) -> Path:
    """Writes a set of short questions and replies of many lengths; `columns` replaces whole columns."""
    said = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    data = {
        "prompt": [said("user", f"question {i}: {'why? ' * (i % 5)}") for i in range(rows)],
        "completion": [said("assistant", REPLIES[i % len(REPLIES)] * (1 + i % 3)) for i in range(rows)],
    }
    types = {"prompt": pa.list_(MESSAGE), "completion": pa.list_(MESSAGE), "label": pa.bool_()}
    if labels:
        data["label"] = [i % 3 != 2 for i in range(rows)]
    data.update(columns)
    pq.write_table(pa.table({name: pa.array(values, types[name]) for name, values in data.items()}), path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model with tied embeddings."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tiny model of the same architecture, so that policy and reference can differ."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "other", seed=2)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the bf16 grid, most of whose matrices are large enough to be split."""
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "model", seed=5, hidden=64, spread=0.05)


@pytest.fixture
def sft_set(tmp_path: Path) -> Path:
    """22 rows of prompt and completion."""
    return write_set(tmp_path / "sft.parquet", 22)


@pytest.fixture
def kto_set(tmp_path: Path) -> Path:
    """21 labelled rows: five groups of four, the last with a fifth row."""
    return write_set(tmp_path / "kto.parquet", 21, labels=True)


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """Writes sets with given columns."""
    return lambda *args, **kwargs: write_set(tmp_path / "made.parquet", *args, **kwargs)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Saves tiny models."""
    return save_tiny_model
