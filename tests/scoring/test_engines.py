"""The local engine: generation against transformers' own, sampling by its distribution, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch

import slmfast
from slmfast import UserError
from slmfast.engines import Generation, decoding, open_engine
from slmfast.engines.base import Sampling
from slmfast.engines.decoding import next_tokens, uniforms

PROMPTS = [
    [{"role": "user", "content": text}]
    for text in ("What is 17 times 3?", "今天天气很好", "fox", "the lazy dog " * 5, "yes", "no", "yes")
]


@pytest.fixture(scope="module")
def engine(model_folder):
    return open_engine("local", str(model_folder), threads=1)


def plain_greedy(model, tokenizer, messages, steps):
    """The oracle: the likeliest next token by a whole plain forward a step, without cache, padding or batch."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    reply = []
    with torch.no_grad():
        while len(reply) < steps and tokenizer.eos_token_id not in reply:
            reply.append(model(input_ids=torch.tensor([ids + reply])).logits[0, -1].argmax().item())
    return reply


def test_greedy_equals_a_plain_loop_for_every_prompt_of_a_batch(engine, model, tokenizer):
    got = engine.generate(PROMPTS, max_new_tokens=12)
    for messages, generation in zip(PROMPTS, got, strict=True):
        expected = plain_greedy(model, tokenizer, messages, 12)
        assert generation.tokens == len(expected)
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert generation.finish_reason == ("stop" if expected[-1] == tokenizer.eos_token_id else "length")


def test_greedy_equals_transformers_generate(engine, model, tokenizer):
    for messages, generation in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=10), strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        mask = torch.ones_like(ids)
        whole = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :]
        assert generation.text == tokenizer.decode(whole, skip_special_tokens=True).strip()


def test_a_model_that_closes_stops_and_leaves_the_batch(build_model, tokenizer, tmp_path):
    """A head raised towards the closing token ends replies after different lengths."""
    model = build_model("gqa")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = open_engine("local", tmp_path)
    prompts = [[{"role": "user", "content": f"the {word} {n}"}] for n in range(8) for word in ("fox", "dog", "今天")]
    got = engine.generate(prompts, max_new_tokens=24)
    expected = [plain_greedy(model, tokenizer, messages, 24) for messages in prompts]
    assert [generation.tokens for generation in got] == [len(reply) for reply in expected]
    assert {generation.finish_reason for generation in got} == {"stop", "length"}
    assert len({generation.tokens for generation in got}) > 2, "replies of one length alone would show nothing"
    for generation, reply in zip(got, expected, strict=True):
        closed = reply[-1] == tokenizer.eos_token_id
        assert generation.finish_reason == ("stop" if closed else "length")
        assert generation.text == tokenizer.decode(reply, skip_special_tokens=True).strip()


def test_idle_slots_are_taken_by_waiting_prompts(build_model, tokenizer, tmp_path, monkeypatch):
    """In batches that wait for their longest reply these prompts take more steps of the model."""
    model = build_model("gqa")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = [[{"role": "user", "content": f"the {word} {n}"}] for n in range(8) for word in ("fox", "dog", "今天")]
    engine = open_engine("local", tmp_path, batch_size=4)
    inner, sizes = decoding._last_logits, []

    def counted(model, ids, *rest):
        sizes.append(ids.shape)
        return inner(model, ids, *rest)

    monkeypatch.setattr(decoding, "_last_logits", counted)
    lengths = [generation.tokens for generation in engine.generate(prompts, max_new_tokens=24)]
    steps = sum(width == 1 for _, width in sizes)
    order = sorted(range(len(prompts)), key=lambda i: engine.count_tokens([prompts[i]])[0])
    apart = sum(max(lengths[i] for i in order[start : start + 4]) - 1 for start in range(0, len(order), 4))
    assert max(rows for rows, _ in sizes) == 4
    assert steps < apart, "otherwise every batch waited for its longest reply"


def test_a_sliding_window_is_obeyed_while_slots_change_hands(tokenizer, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=773, num_key_value_heads=2, initializer_range=0.15, sliding_window=6, eos_token_id=2, **shape
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    got = open_engine("local", tmp_path, batch_size=3).generate(PROMPTS, max_new_tokens=20)
    for messages, generation in zip(PROMPTS, got, strict=True):
        expected = plain_greedy(model, tokenizer, messages, 20)
        assert generation.tokens == len(expected)
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_order_and_batch_size_do_not_change_a_reply(engine, model_folder, temperature):
    options = {"max_new_tokens": 8, "temperature": temperature, "top_p": 0.9, "seed": 11}
    distinct = PROMPTS[:6]
    replies = engine.generate(distinct, **options)
    assert engine.generate(distinct[::-1], **options)[::-1] == replies
    assert [engine.generate([prompt], **options)[0] for prompt in distinct] == replies
    assert open_engine("local", model_folder, batch_size=2).generate(distinct, **options) == replies


def test_sampling_is_a_function_of_the_seed(engine):
    def sample(seed):
        return [g.text for g in engine.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)]

    assert sample(1) == sample(1) != sample(2)
    assert sample(1)[4] != sample(1)[6], "a prompt asked twice is answered twice"


def test_sampling_follows_the_distribution():
    """Pearson's chi-square of 20,000 draws; its mean is the degrees of freedom, 7, and 40 is far outside."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 3.0, 1.5])
    draws = torch.from_numpy(uniforms([1, 2, 3], 0, 20_000, seed=5))
    got = next_tokens(logits.expand(20_000, 8), Sampling(temperature=0.7), draws)
    expected = (logits / 0.7).softmax(0).double() * 20_000
    assert ((torch.bincount(got, minlength=8) - expected) ** 2 / expected).sum() < 40


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5000, 4)
    draws = torch.from_numpy(uniforms([1], 0, 5000, seed=6))
    for top_p, kept in ((0.4, 1), (0.7, 2), (0.9, 3), (1.0, 4)):
        got = next_tokens(logits, Sampling(temperature=1.0, top_p=top_p), draws)
        assert set(got.tolist()) == set(range(kept))
    edge = torch.full((4,), math.nextafter(1.0, 0.0), dtype=torch.float64)
    assert next_tokens(logits[:4], Sampling(temperature=1.0, top_p=0.7), edge).tolist() == [1] * 4


def test_uniforms_differ_by_prompt_occurrence_and_seed():
    streams = [uniforms(p, n, 4, seed=s).tolist() for p in ([1], [1, 2]) for n in (0, 1) for s in (0, 1)]
    assert len({tuple(stream) for stream in streams}) == 8
    assert uniforms([1], 0, 4, seed=0).tolist() == streams[0]


def test_logits_that_are_no_numbers_stop_the_run():
    with pytest.raises(UserError, match="no numbers"):
        next_tokens(torch.tensor([[0.0, math.nan]]), Sampling())


def test_the_models_own_generation_config_does_not_change_greedy(engine, model_folder, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((model_folder / "generation_config.json").read_text())
    config |= {"do_sample": True, "repetition_penalty": 1.5, "top_k": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    penalised = open_engine("local", tmp_path)
    assert penalised.generate(PROMPTS, max_new_tokens=10) == engine.generate(PROMPTS, max_new_tokens=10)


def test_scores_are_the_librarys(engine, model, tokenizer):
    choices = ["yes", "no"]
    expected = slmfast.choose(model, tokenizer, PROMPTS, choices, progress=False)
    np.testing.assert_allclose(engine.choose(PROMPTS, [choices] * len(PROMPTS)), expected, rtol=1e-6)
    table = engine.perplexity(PROMPTS[:2], [["yes", ""], ["no"]])
    expected = slmfast.perplexity(model, tokenizer, PROMPTS[:2], [["yes", ""], ["no"]], progress=False)
    assert table.schema == expected.schema
    assert table["tokens"].equals(expected["tokens"])
    np.testing.assert_allclose(
        table["bits"].to_numpy(zero_copy_only=False), expected["bits"].to_numpy(zero_copy_only=False), rtol=1e-6
    )


def test_count_tokens_and_the_window(engine, model):
    counts = engine.count_tokens(PROMPTS)
    assert engine.window == model.config.max_position_embeddings
    longest = int(np.argmax(counts))
    room = engine.window - counts[longest]
    assert engine.generate([PROMPTS[longest]], max_new_tokens=room)[0].tokens <= room
    with pytest.raises(UserError, match=f"prompt 1 has {counts[longest]} tokens"):
        engine.generate([PROMPTS[2], PROMPTS[longest]], max_new_tokens=room + 1)


def test_the_callers_threads_come_back(engine):
    before = torch.get_num_threads()
    engine.choose(PROMPTS[:1], [["yes", "no"]])
    assert torch.get_num_threads() == before


def test_nothing_in_nothing_out(engine):
    assert engine.generate([], max_new_tokens=4) == []
    assert engine.count_tokens([]) == engine.choose([], []) == []
    assert isinstance(engine.generate(["fox"], max_new_tokens=1)[0], Generation)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("magic", {}, "engine 'magic' is unknown: use "),
        ("local", {"model": "/no/such/model"}, "no model at /no/such/model"),
        ("local", {"threads": 0}, "threads is 0"),
        ("local", {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_mistakes_are_one_line(model_folder, kind, change, message):
    settings = {"model": str(model_folder)} | change
    with pytest.raises(UserError, match=message):
        open_engine(kind, **settings)


def test_a_folder_without_weights_or_tokenizer_is_named(model_folder, tmp_path):
    config = (model_folder / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        open_engine("local", tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer"):
        open_engine("local", tmp_path)
    for file in model_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=f"no model loads from {tmp_path}"):
        open_engine("local", tmp_path).generate(["fox"], max_new_tokens=1)


@pytest.mark.parametrize(("option", "value"), [("temperature", -1.0), ("top_p", 0.0), ("max_new_tokens", 0)])
def test_generation_options_are_checked(engine, option, value):
    with pytest.raises(UserError, match=option):
        engine.generate(["fox"], **({"max_new_tokens": 4} | {option: value}))


def test_one_string_is_no_list_of_prompts(engine):
    for ask in (engine.count_tokens, lambda prompts: engine.generate(prompts, max_new_tokens=1)):
        with pytest.raises(UserError, match="prompts is a str: give a list of prompts"):
            ask("hello")


def test_no_position_leaves_the_window():
    """GPT-2 has a table of positions: a reply that has ended and waits for its neighbours must not read past it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    window, steps, count = 40, 30, 120
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=window, n_embd=16, n_layer=1, n_head=2)).eval()
    prompts = [[n % 50] * (window - steps) for n in range(count)]
    draws = np.random.default_rng(0).random((count, steps))
    replies = decoding.decode(model, prompts, frozenset(range(2)), steps, draws, Sampling(temperature=5.0), slots=16)
    lengths = {len(reply) for reply in replies}
    assert max(lengths) == steps and len(lengths) > 5


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def test_a_rotation_by_the_longest_position_writes_one_reply_at_a_time():
    """Past 16 positions this model turns by other factors: a short prompt beside a long one would, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rotation = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    rotation |= {"original_max_position_embeddings": 16}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, rope_parameters=rotation, initializer_range=0.3)).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 99, n).tolist() for n in (5, 6, 9, 30)]
    with torch.no_grad():
        together = decoding.decode(model, prompts, frozenset(), 6)
        apart = [decoding.decode(model, [prompt], frozenset(), 6)[0] for prompt in prompts]
        ids = torch.tensor([prompts[0]])
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert together == apart
    assert together[0] == plain[0, 5:].tolist()


@pytest.mark.parametrize(
    ("name", "more", "kept"),
    [
        ("Lfm2", HEADS | {"layer_types": ["conv", "full_attention"]}, "lfm2.* has layers of conv"),
        ("Mamba", {}, "mamba.* has (layers of linear_attention|a state of its own)"),
        ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}, "rwkv.* has a state of its own"),
    ],
)
def test_a_model_that_keeps_more_than_keys_and_values_is_refused(name, more, kept):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SMALL, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with pytest.raises(UserError, match=f"model_type {kept}") as caught:
        decoding.decode(model, [[1, 2, 3], [4, 5]], frozenset(), 3)
    assert "\n" not in str(caught.value)
