"""The miniature's models as committed: complete folders, one tokenizer, and scores in the promised order."""

import unicodedata
from random import Random

import pytest
import torch
from safetensors import safe_open

from slmfast import prompts
from slmfast.miniature import MODEL_NAMES, MODELS, lexicon
from slmfast.miniature.examples import LARGE_DIET, Example, draw_example
from slmfast.miniature.measure import judge_scores, task_scores
from slmfast.miniature.phrasings import PHRASINGS
from slmfast.miniature.tokenizer import END, WINDOW, fixed_prompts, train_tokenizer
from slmfast.miniature.training import IGNORED, chat_text, encode

MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS / "large")


def test_folders_are_complete_and_small() -> None:
    for name in MODEL_NAMES:
        assert {file.name for file in (MODELS / name).iterdir()} == MODEL_FILES
    assert sum(file.stat().st_size for file in MODELS.rglob("*") if file.is_file()) <= 12_000_000


def test_weights_are_bf16_with_plain_metadata() -> None:
    sizes = []
    for name in MODEL_NAMES:
        with safe_open(MODELS / name / "model.safetensors", "pt") as weights:
            assert weights.metadata() == {"format": "pt"}
            tensors = [weights.get_tensor(key) for key in weights.keys()]
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)
        sizes.append(sum(tensor.numel() for tensor in tensors))
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_models_load_and_share_one_tokenizer() -> None:
    from transformers import AutoModelForCausalLM

    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(MODELS / name / file).read_bytes() for name in MODEL_NAMES}) == 1
    for name in MODEL_NAMES:
        model = AutoModelForCausalLM.from_pretrained(MODELS / name)
        assert model.config.architectures == ["Qwen2ForCausalLM"]
        assert model.config.max_position_embeddings == WINDOW and model.config.tie_word_embeddings
        assert model.generation_config.eos_token_id == 2


def test_models_were_trained_on_the_ids_that_users_get(tokenizer) -> None:
    """AutoTokenizer builds Qwen2's own tokenizer beside a Qwen2 configuration, whatever tokenizer.json holds."""
    trained_on, rng = train_tokenizer(0), Random(0)
    assert trained_on.get_vocab() == tokenizer.get_vocab()
    for _ in range(1000):
        example = draw_example(LARGE_DIET, rng)
        ids = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == trained_on.encode(chat_text(example.messages)).ids
        assert tokenizer(f"{example.reply}{END}\n")["input_ids"] == trained_on.encode(f"{example.reply}{END}\n").ids


def test_any_text_round_trips(tokenizer) -> None:
    rng = Random(0)
    texts = ["", " \n\t ", "１３＋１４＝？", "naïve 😀 日本語 КАТ", "a  b", fixed_prompts()[0] + " x"]
    texts += [
        "".join(chr(rng.choice((rng.randrange(32, 0xD7FF), rng.randrange(32, 127)))) for _ in range(40))
        for _ in range(50)
    ]
    for text in texts:
        text = unicodedata.normalize("NFC", text)
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_digits_letters_and_characters_stand_alone(tokenizer) -> None:
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]

    assert pieces("1234") == list("1234") and pieces("KATB") == list("KATB")
    said = "".join(chinese for _, chinese in lexicon.all_nouns()) + "".join(
        text for skill in PHRASINGS.values() for text in skill["zh"]
    )
    characters = {character for character in said if "一" <= character <= "鿿"}
    assert all(len(tokenizer(character)["input_ids"]) == 1 for character in characters)
    assert all(len(tokenizer(prompt)["input_ids"]) == 1 for prompt in fixed_prompts())


def test_chat_template_is_what_the_models_were_trained_on(tokenizer) -> None:
    messages = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Reverse KAT."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == chat_text(messages)
    assert text.endswith("<|im_start|>user\nReverse KAT.<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == END and tokenizer.pad_token != tokenizer.eos_token
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert ids == tokenizer(text)["input_ids"]


def test_training_examples_label_the_reply_and_its_closing_token(tokenizer) -> None:
    judged = Example(prompts.quality_prompt("What is 3 + 14?", "17"), "1", embedded="17")
    plain = Example(prompts.user_turn("What is 3 + 14?"), "17")
    for example, expected in ((plain, ["17<|im_end|>"]), (judged, ["17", "1<|im_end|>"])):
        ((ids, labels),) = encode([example], tokenizer.backend_tokenizer)
        runs, previous = [], IGNORED
        for token, label in zip(ids, labels, strict=True):
            assert label in (IGNORED, token)
            if label != IGNORED:
                runs = [*runs, []] if previous == IGNORED else runs
                runs[-1].append(token)
            previous = label
        assert [tokenizer.decode(run) for run in runs] == expected


@pytest.mark.slow
def test_scores_are_in_the_promised_order() -> None:
    scores = {name: task_scores(MODELS / name, count=60, seed=5) for name in MODEL_NAMES}
    mean = {name: sum(tasks.values()) / len(tasks) for name, tasks in scores.items()}
    assert mean["large"] >= 0.8, scores
    assert mean["small"] <= 0.5, scores
    assert mean["small"] < mean["base"] < mean["large"], scores


@pytest.mark.slow
def test_the_large_model_labels_and_judges() -> None:
    scores = judge_scores(MODELS / "large", count=120, seed=5)
    assert scores["label"] >= 0.9 and scores["quality"] >= 0.8, scores
    assert min(scores["instruction_safety"], scores["reply_safety"]) >= 0.95, scores
