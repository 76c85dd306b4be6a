"""A tokenizer and random models, small and strange enough to tell right from almost right."""

import pytest

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "What is 17 times 3? It is 51, give or take 0.5 of a unit.",
    "user assistant system reply yes no",
    "今天天气很好，我们去公园散步。",
    "请把下面的句子翻译成英文：我喜欢学习。",
] * 20
SHAPES = {
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "mqa": {"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 96, "tie_word_embeddings": True},
}
WINDOW = 256


@pytest.fixture(scope="session")
def tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    # Beside a Qwen2 config AutoTokenizer puts these two in, whatever tokenizer.json says.
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@pytest.fixture(scope="session")
def build_model(tokenizer):
    """A function from a shape's name to a random Qwen2 model whose predictions are far from uniform."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def build(shape="gqa", *, vocab_size=773, **changes):
        options = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, **SHAPES[shape], **changes}
        config = Qwen2Config(
            vocab_size=vocab_size,
            max_position_embeddings=options.pop("max_position_embeddings", WINDOW),
            initializer_range=0.15,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        torch.manual_seed(7)
        return Qwen2ForCausalLM(config).eval()

    return build


@pytest.fixture(scope="session")
def model(build_model):
    return build_model("gqa")


@pytest.fixture(scope="session")
def model_folder(model, tokenizer, tmp_path_factory):
    """The model of `model`, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain_logprobs():
    """The oracle: log-probabilities of a continuation's tokens by one plain forward and a full log-softmax."""
    import torch

    def score(model, prefix, continuation):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prefix, *continuation]])).logits[0, len(prefix) - 1 : -1]
        return logits.float().log_softmax(-1)[range(len(continuation)), list(continuation)].double()

    return score
