"""`slmfast.perplexity` against a plain forward and a full log-softmax, and the laws that its scores obey."""

import math
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch

import slmfast
from slmfast import UserError
from slmfast.scoring.perplexity import SCHEMA, slide

PROMPTS = [
    "What is 17 times 3?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "请把下面的句子翻译成英文：我喜欢学习。"}],
    "yes or no? " * 6,
    [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "over what?"},
    ],
    "?",
]
REPLIES = [
    ["51", "It is 51, give or take 0.5.", "no"],
    ["I like to learn."],
    ["yes", "no", "the lazy dog jumps over the quick brown fox, says the user", "yes"],
    ["the lazy dog", "今天天气很好"],
    ["!"],
]


def render(tokenizer, prompt):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return tokenizer.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)


def close(tokenizer, reply):
    return [*tokenizer.encode(reply, add_special_tokens=False), tokenizer.convert_tokens_to_ids("<|im_end|>")]


def score(model, tokenizer, prompts=PROMPTS, replies=REPLIES, **options):
    return slmfast.perplexity(model, tokenizer, prompts, replies, progress=False, **options)


@pytest.mark.parametrize("shape", ["tied", "gqa", "mqa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_a_plain_forward(build_model, tokenizer, plain_logprobs, shape, attention):
    model = build_model(shape)
    model.set_attn_implementation(attention)
    rows = score(model, tokenizer, batch_tokens=300).to_pylist()
    expected = [(i, j, reply) for i, several in enumerate(REPLIES) for j, reply in enumerate(several)]
    assert [(row["prompt_index"], row["reply_index"]) for row in rows] == [(i, j) for i, j, _ in expected]
    for row, (i, _, reply) in zip(rows, expected, strict=True):
        continuation = close(tokenizer, reply)
        logprobs = plain_logprobs(model, render(tokenizer, PROMPTS[i]), continuation)
        assert row["tokens"] == len(continuation)
        assert row["bits"] == pytest.approx(-logprobs.sum().item() / math.log(2), abs=1e-5 * len(continuation))
        assert row["bits_per_token"] == pytest.approx(-logprobs.mean().item() / math.log(2), abs=1e-5)
        assert row["perplexity"] == pytest.approx(2 ** row["bits_per_token"], rel=1e-12)


@pytest.mark.parametrize("several", [1, 2, 8])
def test_lengths_from_one_token_to_the_window(build_model, tokenizer, plain_logprobs, several):
    model = build_model("gqa", max_position_embeddings=64)
    rng = random.Random(several)
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths = [[rng.randint(1, 62) for _ in range(several - 1)] + [62] for _ in range(3)]
    replies = [["".join(rng.choice("xqzj") for _ in range(n)) for n in row] for row in lengths]
    rows = score(model, tokenizer, ["k"] * 3, replies, template=None, batch_tokens=100).to_pylist()
    prefix = tokenizer.encode("k", add_special_tokens=False)
    for row in rows:
        reply = replies[row["prompt_index"]][row["reply_index"]]
        ids = tokenizer.encode(reply, add_special_tokens=False)
        logprobs = plain_logprobs(model, prefix, [*ids, closing])
        assert row["bits_per_token"] == pytest.approx(-logprobs.mean().item() / math.log(2), abs=1e-5)
    assert max(row["tokens"] for row in rows) == 63, "a sequence of exactly the window is scored"


def test_any_order_and_any_batch_gives_the_same_scores(model, tokenizer):
    def bits(table):
        return np.array(table["bits"].to_pylist())

    reference = bits(score(model, tokenizer))
    for batch_tokens in (1, 64, 150, 100_000):
        np.testing.assert_allclose(bits(score(model, tokenizer, batch_tokens=batch_tokens)), reference, rtol=1e-6)
    order = [3, 0, 4, 2, 1]
    shuffled = score(model, tokenizer, [PROMPTS[i] for i in order], [REPLIES[i][::-1] for i in order])
    starts = np.cumsum([0, *map(len, REPLIES)])
    expected = np.concatenate([reference[starts[i] : starts[i + 1]][::-1] for i in order])
    assert (bits(shuffled) == expected).all(), "batches are made of the whole input: not even rounding may differ"


def test_sharing_a_prompt_gives_the_separate_scores(model, tokenizer):
    together = score(model, tokenizer)
    flat = [(prompt, [reply]) for prompt, several in zip(PROMPTS, REPLIES, strict=True) for reply in several]
    apart = score(model, tokenizer, [prompt for prompt, _ in flat], [reply for _, reply in flat])
    np.testing.assert_allclose(together["bits"].to_numpy(), apart["bits"].to_numpy(), rtol=1e-6)


def test_a_sliding_window_layer_is_never_shared_away(build_model, tokenizer, plain_logprobs):
    model = build_model("gqa", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert "sliding_attention" in model.config.layer_types
    rows = score(model, tokenizer).to_pylist()
    logprobs = plain_logprobs(model, render(tokenizer, PROMPTS[2]), close(tokenizer, REPLIES[2][2]))
    row = next(row for row in rows if (row["prompt_index"], row["reply_index"]) == (2, 2))
    assert row["bits_per_token"] == pytest.approx(-logprobs.mean().item() / math.log(2), abs=1e-5)


def test_a_sliding_window_without_layer_types_is_never_shared_away(tokenizer, plain_logprobs):
    """Mistral's config names no layers: its one window is that of all of them."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=773, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, **shape
    )
    whole = MistralForCausalLM(config).eval()
    config.sliding_window = 8
    model = MistralForCausalLM(config).eval()
    model.load_state_dict(whole.state_dict())
    assert getattr(config, "layer_types", None) is None
    rows = score(model, tokenizer).to_pylist()
    row = next(row for row in rows if (row["prompt_index"], row["reply_index"]) == (2, 2))
    logprobs = plain_logprobs(model, render(tokenizer, PROMPTS[2]), close(tokenizer, REPLIES[2][2]))
    assert row["bits_per_token"] == pytest.approx(-logprobs.mean().item() / math.log(2), abs=1e-5)


def test_empty_and_null_replies_score_null(model, tokenizer):
    rows = score(model, tokenizer, ["a", "b", "c"], [["", "x", None], [], [""]]).to_pylist()
    assert [(row["prompt_index"], row["reply_index"]) for row in rows] == [(0, 0), (0, 1), (0, 2), (2, 0)]
    for row in rows:
        values = [row[name] for name in ("tokens", "bits", "bits_per_token", "perplexity")]
        assert (None not in values) if row["reply_index"] == 1 else values == [None] * 4


def test_nothing_to_score_is_an_empty_table(model, tokenizer):
    assert score(model, tokenizer, [], []).equals(SCHEMA.empty_table())
    assert score(model, tokenizer, ["a"], [[]]).num_rows == 0


def test_over_the_window_is_rejected_and_never_cut(model, tokenizer):
    length = len(render(tokenizer, "a")) + len(close(tokenizer, "yes no"))
    fits, over = (score(model, tokenizer, ["a"], [["yes no", "x"]], window=length - cut).to_pylist() for cut in (0, 1))
    assert fits[0]["bits"] is not None
    assert over[0]["bits"] is over[0]["bits_per_token"] is over[0]["perplexity"] is None
    assert over[0]["tokens"] == fits[0]["tokens"], "how long it was stands beside the missing score"
    assert over[1]["bits"] == pytest.approx(fits[1]["bits"], rel=1e-6)


def test_sliding_scores_every_token_once_and_with_context():
    for length in range(1, 40):
        for prompt in (1, 3, 20):
            ids = list(range(prompt + length))
            pieces = slide(ids[:prompt], ids[prompt:], 10)
            assert [token for piece in pieces for token in piece.continuations[0]] == ids[prompt:]
            for piece in pieces:
                whole = [*piece.prefix, *piece.continuations[0]]
                assert len(whole) <= 10 and whole == ids[whole[0] : whole[-1] + 1]
                assert len(piece.prefix) >= min(5, prompt)


def test_sliding_window_equals_the_plain_forward_of_its_pieces(model, tokenizer, plain_logprobs):
    prompt, reply = "over the lazy dog " * 3, "the quick brown fox jumps " * 9
    row = score(model, tokenizer, [prompt], [[reply]], window=32, long="slide").to_pylist()[0]
    pieces = slide(render(tokenizer, prompt), close(tokenizer, reply), 32)
    total = sum(plain_logprobs(model, piece.prefix, piece.continuations[0]).sum().item() for piece in pieces)
    assert len(pieces) > 2
    assert row["bits"] == pytest.approx(-total / math.log(2), abs=1e-5 * row["tokens"])
    short = score(model, tokenizer, ["a"], [["yes"]], window=32, long="slide")
    assert short.equals(score(model, tokenizer, ["a"], [["yes"]], window=32)), "what fits is not touched by it"


def test_unconditional_scores_do_not_see_the_prompt(model, tokenizer, plain_logprobs):
    rows = score(model, tokenizer, ["a", "b"], [["yes no"], ["yes no"]], unconditional=True).to_pylist()
    logprobs = plain_logprobs(model, [tokenizer.eos_token_id], close(tokenizer, "yes no"))
    for row in rows:
        assert row["bits"] == pytest.approx(-logprobs.sum().item() / math.log(2), abs=1e-5)


def test_raw_text_is_joined_as_it_is(model, tokenizer, plain_logprobs):
    rows = score(model, tokenizer, ["the quick", ""], [[" brown fox"], ["fox"]], template=None).to_pylist()
    prefixes = [tokenizer.encode("the quick", add_special_tokens=False), [tokenizer.eos_token_id]]
    for row, prefix, reply in zip(rows, prefixes, (" brown fox", "fox"), strict=True):
        logprobs = plain_logprobs(model, prefix, close(tokenizer, reply))
        assert row["bits"] == pytest.approx(-logprobs.sum().item() / math.log(2), abs=1e-5 * row["tokens"])


def test_a_path_scores_like_its_module(model, tokenizer, model_folder):
    expected = score(model, tokenizer)
    for given in (None, str(model_folder), tokenizer):
        got = score(str(model_folder), given)
        np.testing.assert_allclose(got["bits"].to_numpy(), expected["bits"].to_numpy(), rtol=1e-6)


def test_arrow_columns_are_taken_as_they_are(model, tokenizer):
    got = score(model, tokenizer, pa.chunked_array([["a"], ["b"]]), pa.array([["yes", None], ["no"]]))
    assert got.equals(score(model, tokenizer, ["a", "b"], [["yes", None], ["no"]]))


def test_low_precision_stays_within_the_eager_error(build_model, tokenizer, plain_logprobs):
    exact, low = build_model("gqa"), build_model("gqa").to(torch.bfloat16)
    got = score(low, tokenizer)["bits_per_token"].to_numpy()
    pairs = [(i, reply) for i, several in enumerate(REPLIES) for reply in several]
    errors = []
    for value, (i, reply) in zip(got, pairs, strict=True):
        prefix, continuation = render(tokenizer, PROMPTS[i]), close(tokenizer, reply)
        truth, eager = (-plain_logprobs(m, prefix, continuation).mean().item() / math.log(2) for m in (exact, low))
        errors.append((abs(value - truth), abs(eager - truth)))
    ours, theirs = np.array(errors).T
    assert ours.mean() <= 1.25 * theirs.mean() + 1e-3


def test_training_mode_comes_back_and_dropout_never_scores(build_model, tokenizer):
    model = build_model("gqa", attention_dropout=0.5)
    quiet = score(model, tokenizer)
    model.train()
    assert score(model, tokenizer).equals(quiet)
    assert model.training


def test_nan_never_leaves(build_model, tokenizer):
    model = build_model("gqa")
    model.lm_head.weight.data[5] = math.nan
    with pytest.raises(UserError, match="no numbers"):
        score(model, tokenizer)
    with pytest.raises(UserError, match="no numbers"):
        slmfast.choose(model, tokenizer, ["a"], ["yes"], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replies": ["flat"]}, r"replies\[0\] is a str"),
        ({"replies": [["a"], ["b"]]}, "1 prompts but 2 lists"),
        ({"replies": [[3]]}, r"replies\[0\]\[0\] is a int"),
        ({"prompts": [{"role": "user"}]}, "prompt 0 is neither"),
        ({"prompts": [[]]}, "prompt 0 is neither"),
        ({"template": "alpaca"}, "template 'alpaca'"),
        ({"long": "cut"}, "long='cut'"),
        ({"window": 1}, "window is 1"),
        ({"window": "8"}, "window is '8'"),
        ({"window": 257}, "window is 257, but Qwen2ForCausalLM knows 256 positions"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"batch_tokens": "9"}, "batch_tokens is '9'"),
        ({"prompts": "ab", "replies": [["x"], ["y"]]}, "prompts is a str"),
        ({"prompts": None}, "prompts is a NoneType"),
        ({"replies": "ab"}, "replies is a str"),
        ({"replies": None}, "replies is a NoneType"),
        ({"prompts": ["a", "b\ud800"], "replies": [["x"], ["y"]]}, "prompt 1 holds a lone surrogate"),
        ({"replies": [["x", "y\udfff"]]}, r"replies\[0\]\[1\] holds a lone surrogate"),
        ({"dtype": "bfloat16"}, "the module is torch.float32"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"model": 5}, "model is a int"),
        ({"model": "no/such/folder"}, "no model at no/such/folder"),
        ({"tokenizer": "/no/such/folder"}, "no model at /no/such/folder"),
        ({"tokenizer": None}, "brings no tokenizer"),
    ],
)
def test_mistakes_are_one_line_that_names_them(model, tokenizer, arguments, message):
    given = {"model": model, "tokenizer": tokenizer, "prompts": ["a"], "replies": [["b"]]} | arguments
    with pytest.raises(UserError, match=message) as caught:
        slmfast.perplexity(**given, progress=False)
    assert "\n" not in str(caught.value)


def test_a_head_that_is_more_than_a_matrix_is_refused(build_model, tokenizer):
    model = build_model("gqa")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UserError, match="final_logit_softcapping"):
        score(model, tokenizer)


def test_a_transform_that_no_config_names_is_found(build_model, tokenizer):
    for change in (lambda logits: logits * 0.9, lambda logits: logits + 0.5, lambda logits: 3 * (logits / 3).tanh()):
        model = build_model("gqa")
        model.lm_head.register_forward_hook(lambda module, inputs, logits, change=change: change(logits))
        with pytest.raises(UserError, match="does more to its logits than its LM head's matrix"):
            score(model, tokenizer)


def test_a_token_of_over_1024_bits_is_infinitely_perplexing(build_model, tokenizer):
    model = build_model("gqa")
    model.lm_head.weight.data *= 3000
    row = score(model, tokenizer, ["a"], [["b zz"]]).to_pylist()[0]
    assert math.isfinite(row["bits"]) and row["bits_per_token"] > 1024
    assert row["perplexity"] == math.inf


def test_a_truncated_model_is_one_line(model_folder, tokenizer, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no model loads from .*cut") as caught:
        score(folder, tokenizer)
    assert "\n" not in str(caught.value)


def test_real_tokenizer_closes_with_im_end(real_data, build_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_data / "qwen2-0.5b")
    model = build_model("gqa", vocab_size=151_936)
    row = score(model, tokenizer, ["今天天气如何？"], [["很好。"]]).to_pylist()[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "今天天气如何？"}], tokenize=False, add_generation_prompt=True
    )
    prefix, reply = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, "很好。"))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prefix, *reply, 151_645]])).logits[0, len(prefix) - 1 : -1]
    logprobs = logits.log_softmax(-1)[range(len(reply) + 1), [*reply, 151_645]]
    assert row["tokens"] == len(reply) + 1
    assert row["bits_per_token"] == pytest.approx(-logprobs.mean().item() / math.log(2), abs=1e-5)
