"""Our language model against HFLM on the miniature's tasks, and what it refuses."""

import pytest

from slmfast.errors import UserError
from slmfast.evaluation.language_model import PackedLM
from slmfast.job import BUILTIN_MODELS
from slmfast.recipe import Evaluate
from slmfast.scoring.loading import load_model, load_tokenizer

TASKS = ["mini_arithmetic", "mini_text", "mini_lexicon", "mini_compare", "mini_code"]


def loaded(name):
    folder = str(BUILTIN_MODELS / name)
    return load_model(folder, device="cpu"), load_tokenizer(folder)


@pytest.fixture(scope="module")
def small():
    """The miniature's small model and its tokenizer."""
    return loaded("small")


@pytest.fixture(scope="module")
def packed(small):
    return PackedLM(*small)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The miniature's items and task files."""
    from slmfast.evaluation import task_folder
    from slmfast.miniature.world import write_world

    root = tmp_path_factory.mktemp("world")
    write_world(root / "raw", size=200, seed=0)
    return task_folder("builtin:miniature", str(root / "raw" / "eval"), root / "tasks")


def asked(kind, *arguments, task="t"):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, metadata=(task, number, 1)) for number, given in enumerate(arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("template", [True, False])
def test_every_item_equals_hflms(world, tmp_path, hflm, answers, same, template):
    large = loaded("large")
    settings = Evaluate(tasks=TASKS, limit=40, chat_template=template)
    ours = answers(PackedLM(*large), settings, tmp_path / "ours", world)
    theirs = answers(hflm(*large), settings, tmp_path / "theirs", world)
    assert same(ours, theirs) == 40 * len(TASKS)
    for task in TASKS:
        assert ours["results"][task] == theirs["results"][task]


TEXTS = ["The sun is warm.", " today", "今天天气很好，", "", "a  b  ", "1 + 1 = "]


def test_choices_of_every_make_equal_hflms(small, packed, hflm):
    """Spaces that move to the choice, an empty context, choices of several tokens, the same twice, greedy ones."""
    given = [(context, more) for context in TEXTS for more in (" 2", "是的", "yes and no", "2", " 2")]
    kwargs = {"max_gen_toks": 3}
    replies = packed.generate_until(asked("generate_until", *((text, kwargs) for text in TEXTS if text)))
    given += list(zip(filter(None, TEXTS), replies, strict=True))
    given = [pair for pair in given if pair[1]]
    ours = packed.loglikelihood(asked("loglikelihood", *given))
    theirs = hflm(*small, batch_size=4).loglikelihood(asked("loglikelihood", *given), disable_tqdm=True)
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == (pytest.approx(its[0], abs=1e-4), its[1])
    assert 0 < sum(greedy for _, greedy in theirs) < len(theirs)


def test_rolling_windows_equal_hflms(small, packed, hflm, monkeypatch):
    """Texts of none, one, and several windows."""
    texts = [("",), ("short",), ("the quick brown fox jumps over the lazy dog " * 20,)]
    harness = hflm(*small)
    harness._max_length = 64
    monkeypatch.setattr(packed, "max_length", 64)
    ours = packed.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    assert ours == pytest.approx(harness.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)), abs=1e-3)
    assert ours[0] == 0.0 and len(packed.tok_encode(*texts[2])) > 3 * 64


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": "e", "max_new_tokens": 9},
        {"until": [" the", "。", ""], "do_sample": False, "temperature": 0.0, "max_gen_toks": 20},
        {"max_gen_toks": 16, "temperature": 0, "top_k": 5, "num_beams": 1},
        {"until": ["<|im_end|>"], "max_gen_toks": 16, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("own", [None, 1.1])
def test_replies_equal_hflms(small, packed, hflm, monkeypatch, settings, own):
    """With and without a repetition penalty in the model's generation config, as Qwen2's chat models have it."""
    monkeypatch.setattr(small[0].generation_config, "repetition_penalty", own)
    given = [(context, dict(settings)) for context in (*TEXTS[:3], "1 + 1 = ", "1 + 1 = ", "What is 7 minus 3?")]
    ours = packed.generate_until(asked("generate_until", *given))
    harness = hflm(*small)
    assert ours == harness.generate_until(asked("generate_until", *given), disable_tqdm=True)
    assert len(set(ours)) > 2
    # the neighbours in a batch, and who waits for a slot, change nothing
    monkeypatch.setattr(packed, "slots", 2)
    assert packed.generate_until(asked("generate_until", *given)) == ours


def test_a_stop_string_ends_the_work_at_once(packed, monkeypatch):
    """Beyond it nothing is computed, wherever the tokens' bounds lie."""
    from slmfast.evaluation import language_model

    lengths = []
    whole = language_model.decode

    def noted(*given, **options):
        replies = whole(*given, **options)
        lengths.extend(map(len, replies))
        return replies

    monkeypatch.setattr(language_model, "decode", noted)
    (free,) = packed.generate_until(asked("generate_until", ("The sun", {"max_gen_toks": 24})))
    term = free[4:7]
    (cut,) = packed.generate_until(asked("generate_until", ("The sun", {"max_gen_toks": 24, "until": [term]})))
    assert cut == free[: free.index(term)]
    assert lengths[1] < lengths[0]
    assert len(packed.tokenizer(cut)["input_ids"]) + len(term) >= lengths[1]


def test_sampled_replies_depend_on_no_neighbour(packed):
    kwargs = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    given = [(text, kwargs) for text in ("1 + 1 = ", "The sun", "1 + 1 = ")]
    replies = packed.generate_until(asked("generate_until", *given))
    assert packed.generate_until(asked("generate_until", *given[:2])) == replies[:2]
    assert replies[0] != replies[2]


def test_what_several_items_begin_with_is_computed_once(small, packed, monkeypatch):
    from slmfast.scoring import forward

    sizes = []
    whole = forward._sums
    monkeypatch.setattr(forward, "_sums", lambda m, w, batch: sizes.append(batch.tokens) or whole(m, w, batch))
    shots = "Question: what is one and one? Answer: two. " * 12
    items = [
        (f"{shots}Question: {word} {i}? Answer:", f" {answer}")
        for i, word in enumerate(["x", "y", "z"] * 5)
        for answer in "ABCD"
    ]
    packed.loglikelihood(asked("loglikelihood", *items))
    shared = len(packed.tok_encode(shots))
    alone = {context: len(packed.tok_encode(context)) - shared for context, _ in items}
    assert shared > 8 * max(alone.values())
    assert sum(sizes) <= 2 * shared + sum(alone.values()) + 4 * len(items)


def test_refusals_name_the_item(small, packed, monkeypatch):
    monkeypatch.setattr(packed, "max_length", 16)
    fits = ("1 2 3", " 4")
    with pytest.raises(UserError, match=r"item 1 of task t takes \d+ tokens, .* window has 16: use fewer shots"):
        packed.loglikelihood(asked("loglikelihood", fits, ("one two three " * 9, " 4")))
    with pytest.raises(UserError, match="item 0 of task t has a choice without tokens"):
        packed.loglikelihood(asked("loglikelihood", ("1 2 3", "")))
    with pytest.raises(UserError, match="item 0 of task t has a question without tokens"):
        packed.loglikelihood(asked("loglikelihood", (" ", "4")))
    with pytest.raises(UserError, match=r"item 1 of task t takes \d+ tokens"):
        packed.generate_until(asked("generate_until", ("1", {"max_gen_toks": 4}), ("1 2 3 " * 4, {"max_gen_toks": 8})))
    with pytest.raises(UserError, match=r"task t: generation_kwargs\.num_beams is not known here"):
        packed.generate_until(asked("generate_until", ("1", {"num_beams": 4})))
    with pytest.raises(UserError, match=r"task t: generation_kwargs\.top_k is not known here"):
        packed.generate_until(asked("generate_until", ("1", {"do_sample": True, "temperature": 1.0, "top_k": 4})))
    monkeypatch.setattr(small[0].generation_config, "no_repeat_ngram_size", 3)
    with pytest.raises(UserError, match=r"generation_config\.json sets no_repeat_ngram_size to 3"):
        packed.generate_until(asked("generate_until", ("1", {"max_gen_toks": 4})))


def test_the_longest_item_that_fits_is_what_hflm_does_not_cut(small, packed, hflm, monkeypatch):
    """The last token is no input: a window of L reads L + 1 tokens."""
    context, more = "the quick brown fox jumps over the lazy dog", " again"
    tokens = len(packed.tok_encode(context + more))
    harness = hflm(*small)
    (whole,) = harness.loglikelihood(asked("loglikelihood", (context, more)), disable_tqdm=True)
    harness._max_length = tokens - 1
    monkeypatch.setattr(packed, "max_length", tokens - 1)
    assert packed.loglikelihood(asked("loglikelihood", (context, more)))[0][0] == pytest.approx(whole[0], abs=1e-4)
    assert harness.loglikelihood(asked("loglikelihood", (context, more)), disable_tqdm=True)[0] == whole
    monkeypatch.setattr(packed, "max_length", tokens - 2)
    with pytest.raises(UserError, match="item 0 of task t takes"):
        packed.loglikelihood(asked("loglikelihood", (context, more)))


@pytest.mark.parametrize(("longest", "tokens"), [(10, 2048), (512, 2048), (513, 4096), (3000, 16384), (9999, 16384)])
def test_packs_hold_several_of_the_longest_items(longest, tokens):
    from slmfast.evaluation.language_model import pack_tokens
    from slmfast.scoring.packing import Group

    assert pack_tokens([Group([1], [[1]]), Group([1] * (longest - 2), [[1], [1, 2]])]) == tokens


def test_a_template_without_system_messages_goes_without_them(small, packed, hflm, monkeypatch):
    no_system = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    strict = f"{{% for m in messages %}}{no_system}{{{{ m.content }}}}{{% endfor %}}"
    monkeypatch.setattr(small[1], "chat_template", strict)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with pytest.warns(UserWarning, match="no system message"):
        assert packed.apply_chat_template(chat) == hflm(*small).apply_chat_template(chat) == "u"
