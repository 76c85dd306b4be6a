"""bench/scoring.py on the miniature's model: every case, its last line, and that a wrong peer gets no ratio."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slmfast import cli
from slmfast.errors import UserError

CHECKOUT = Path(__file__).parent.parent
BENCH = CHECKOUT / "bench"
MODEL = CHECKOUT / "slmfast" / "miniature" / "models" / "base"
KEYS = {"case", "peer", "version", "ours", "theirs", "unit", "ratio", "same_answer"}


@pytest.fixture
def bench(monkeypatch):
    """The benchmark as `slmfast bench` loads it, on made-up texts, each of whose calls is timed once."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.delenv("SLMFAST_DATA", raising=False)
    spec = importlib.util.spec_from_file_location("bench_scoring", BENCH / "scoring.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.import_module("timing"), "ENOUGH_SECONDS", 0.0)
    for name in ("inputs", "scoring_texts"):
        monkeypatch.setattr(importlib.import_module(name), "data_folder", lambda: None)
    monkeypatch.setattr(module, "data_folder", lambda: None)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


SMALL = ["--model-config", str(MODEL), "--tokenizer", str(MODEL), "--device", "cpu", "--threads", "1", "--prompts", "2"]


def run(bench, capsys, *arguments: str) -> tuple[int, dict, str]:
    """The exit code, the JSON object of the last line, and what stood before it."""
    code = bench.main([*SMALL, *arguments])
    *before, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(before)


def peers_of(document: dict) -> list[str]:
    return [row["peer"] for row in document["results"]]


def test_the_last_line_is_the_document(bench, capsys, tmp_path):
    out = tmp_path / "figures" / "scoring.json"
    code, document, before = run(bench, capsys, "--case", "long", "--out", str(out))
    assert code == 0
    assert document.keys() == {"bench", "device", "commit", "results"} and document["bench"] == "scoring"
    assert json.loads(out.read_text()) == document
    harness, plain, utilisation = document["results"]
    assert all(row.keys() == KEYS for row in document["results"])
    assert (harness["peer"], plain["peer"]) == ("lm-eval HFLM loglikelihood", "transformers, one at a time")
    for row in (harness, plain):
        assert row["same_answer"] is True and row["version"]
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert "2 prompts of" in row["case"] and "3 replies each of" in row["case"] and row["case"] in before
    assert " a batch" in harness["case"] and " a batch" not in plain["case"]
    assert utilisation["same_answer"] is None and utilisation["unit"] == "TFLOP/s"
    assert utilisation["ratio"] == pytest.approx(utilisation["ours"] / utilisation["theirs"])
    assert f"utilisation {100 * utilisation['ratio']:.1f} %" in utilisation["case"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_case_in_one_process_agrees_with_its_peers(bench, capsys, dtype):
    cases = [part for name in ("short", "padded", "sharing", "judge") for part in ("--case", name)]
    code, document, before = run(bench, capsys, *cases, "--dtype", dtype)
    assert code == 0 and "no figure" not in before
    assert peers_of(document) == [
        "lm-eval HFLM loglikelihood",
        "a plain matrix product",
        "method of evaluate's perplexity",
        "method of LLaMA-Factory's cal_ppl",
        "slmfast, a call for each reply",
        "transformers generate",
        "transformers generate",
    ]
    assert all(row["same_answer"] is not False for row in document["results"])
    assert "4 replies each" in document["results"][4]["case"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_taken_in_processes_of_their_own(bench, capsys, dtype):
    arguments = ["--case", "head", "--case", "memory", "--positions", "3000", "--dtype", dtype]
    code, document, before = run(bench, capsys, *arguments)
    assert code == 0
    assert before.count("it runs on CUDA only") == 2
    head = [row for row in document["results"] if row["case"].startswith("head")]
    assert [(row["peer"], row["unit"]) for row in head] == [
        ("full logits", "s"),
        ("full logits", "MB"),
        ("TRL's chunked head", "s"),
        ("TRL's chunked head", "MB"),
        ("the bare matrix product", "s"),
    ]
    full = head[1]
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    assert full["theirs"] > 3000 * vocabulary * 4 / 1e6 > full["ours"]  # whole logits in fp32, and not ours
    assert full["ratio"] == pytest.approx(full["ours"] / full["theirs"])
    memory = [row for row in document["results"] if row["case"].startswith("memory")]
    assert len(memory) == 8 and all(row["same_answer"] is True for row in head[:4] + memory)
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in memory if row["unit"] == "s")


WRONG = {
    "the closing token is left out": lambda pair: replace(pair, continuation=pair.continuation[:-1]),
    "another token": lambda pair: replace(pair, continuation=(pair.continuation[0] ^ 1, *pair.continuation[1:])),
    "another prompt": lambda pair: replace(pair, context=pair.context[len(pair.context) // 2 :]),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_peer_that_answers_another_question_gets_no_ratio(bench, capsys, monkeypatch, change, dtype):
    cases = sys.modules["scoring_cases"]
    right = cases.CAL_PPL.run

    def wrong(subject, texts, batch):
        pairs = [list(several) for several in texts.pairs]
        pairs[-1][-1] = change(pairs[-1][-1])  # one reply of all
        return right(subject, replace(texts, pairs=pairs), batch)

    monkeypatch.setattr(cases, "CAL_PPL", replace(cases.CAL_PPL, run=wrong))
    code, document, before = run(bench, capsys, "--case", "padded", "--dtype", dtype)
    good, bad = document["results"]
    assert code == 1
    assert good["same_answer"] is True and good["ratio"] is not None
    assert (bad["same_answer"], bad["ratio"]) == (False, None)
    assert "NO: no ratio" in before


def test_our_own_wrong_answer_gets_no_ratio_either(bench, capsys, monkeypatch):
    cases = sys.modules["scoring_cases"]
    right = cases.OURS.run

    def wrong(*arguments):
        return right(*arguments) * (1 + 1e-3)

    monkeypatch.setattr(cases, "OURS", replace(cases.OURS, run=wrong))
    code, document, _ = run(bench, capsys, "--case", "sharing")
    assert code == 1 and [row["ratio"] for row in document["results"]] == [None]


def test_a_wrong_choice_gets_no_ratio(bench, capsys, monkeypatch):
    slmfast = sys.modules["slmfast"]
    choose = slmfast.choose
    monkeypatch.setattr(slmfast, "choose", lambda *given, **more: [row[::-1] for row in choose(*given, **more)])
    code, document, _ = run(bench, capsys, "--case", "judge")
    assert code == 1 and {(row["same_answer"], row["ratio"]) for row in document["results"]} == {(False, None)}


def test_a_peer_that_fails_is_named_and_costs_no_other_figure(bench, capsys, monkeypatch):
    cases = sys.modules["scoring_cases"]

    def failing(*arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(cases, "EVALUATE", replace(cases.EVALUATE, run=failing))
    code, document, before = run(bench, capsys, "--case", "padded")
    assert code == 0 and peers_of(document) == ["method of LLaMA-Factory's cal_ppl"]
    assert "no figure: method of evaluate's perplexity, padded: out of luck" in before


def test_a_case_that_fails_lets_the_others_run(bench, capsys, monkeypatch, tmp_path):
    def failing(context):
        yield sys.modules["result_table"].Result(group="long", case="the first", ours=1.0, unit="s")
        raise MemoryError("too many logits")

    monkeypatch.setitem(bench.CASES, "long", failing)
    out = tmp_path / "scoring.json"
    code, document, before = run(bench, capsys, "--case", "long", "--case", "sharing", "--out", str(out))
    assert code == 1 and [row["case"].partition(",")[0] for row in document["results"]] == ["the first", "sharing"]
    assert "no figure: long: MemoryError: too many logits" in before and json.loads(out.read_text()) == document


def test_transient_memory_is_what_a_call_takes_at_its_peak(bench):
    transient = importlib.import_module("transient").transient
    megabyte, kept = 1 << 20, torch.ones(1 << 25)  # 128 MiB that were there before

    def call():
        first = torch.ones(10 << 18)  # 10 MiB, which an earlier call may have left in the C library's hands
        del first
        return float((kept[: 50 << 18] * 2).sum())  # 50 MiB

    call()
    measured = transient(call, torch.device("cpu"))
    assert measured.value == 2 * (50 << 18) and measured.seconds > 0
    assert 49 * megabyte <= measured.bytes <= 70 * megabyte
    small = transient(lambda: torch.ones(10 << 18).sum(), torch.device("cpu"))
    assert 9 * megabyte <= small.bytes <= 20 * megabyte


def test_a_peer_is_tried_with_all_sequences_at_once_too(bench):
    worth_trying = sys.modules["scoring_context"].worth_trying
    assert worth_trying((1, 4, 8, 16), 6) == [1, 4, 8]
    assert worth_trying((1, 4), 3) == [1, 4] and worth_trying((8, 16), 3) == [8] and worth_trying((1, 4), 90) == [1, 4]


def test_the_gate_in_fp32(bench):
    same = sys.modules["scoring_gate"].same_answer
    sums, tokens = np.array([-1000.0, -0.5, -80.0]), np.array([70, 1, 9])
    assert same(sums, sums + np.array([0.09, 0.0009, -0.007]), tokens)
    for place, error in ((0, 0.2), (1, 0.002), (2, -0.02), (0, np.nan), (1, np.inf)):
        other = sums.copy()
        other[place] += error
        assert not same(sums, other, tokens) and not same(other, sums, tokens)
    assert not same(sums, sums[:2], tokens)


def test_the_gate_in_low_precision(bench):
    same = sys.modules["scoring_gate"].same_answer
    truth, tokens = np.array([-1000.0, -500.0]), np.array([100, 50])
    rounded = truth + np.array([0.4, -0.3])
    assert same(truth + 0.2, rounded, tokens, truth)
    assert same(rounded, truth, tokens, truth) is False  # ours errs more than the peer does
    many, noise = np.repeat(truth, 500), np.random.default_rng(0).normal(size=1000)
    common = np.repeat(tokens, 500)
    assert same(many + 0.3 * noise, many + 0.3 * noise[::-1], common, many)
    assert not same(many + 0.6 * noise, many + 0.3 * noise[::-1], common, many)  # twice the error, over many replies
    assert not same(truth, truth + np.array([0.0, 12.0]), tokens, truth)  # a token of the peer's is missing
    assert not same(truth + np.array([0.0, 12.0]), truth + np.array([0.0, 12.0]), tokens, truth)


def test_replies_are_of_like_length_and_prompts_of_the_lengths_asked_for(bench):
    texts = sys.modules["scoring_texts"]
    tokenizer = bench.load_tokenizer(MODEL)
    for lengths in (texts.LONG, texts.SHORT):
        drawn = texts.Drawer(tokenizer, 3).draw(6, 4, lengths)
        assert drawn.prompts == texts.Drawer(tokenizer, 3).draw(6, 4, lengths).prompts
        for prompt, replies, pairs in zip(drawn.prompts, drawn.replies, drawn.pairs, strict=True):
            chat = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            assert lengths[0] <= len(ids) <= lengths[1] and all(pair.context == tuple(ids) for pair in pairs)
            closed = [(*tokenizer(r, add_special_tokens=False)["input_ids"], 2) for r in replies]
            assert [pair.continuation for pair in pairs] == closed and len(set(replies)) == 4
            sizes = [len(pair.continuation) for pair in pairs]
            assert max(sizes) - min(sizes) <= max(4, sizes[0] // 4)


def test_flops_are_counted_as_torch_counts_them(bench):
    """One prompt with one reply needs what torch's own counter finds for a causal forward and a head on the reply."""
    from torch.utils.flop_counter import FlopCounterMode

    config = bench.model_config(str(MODEL))
    model = bench.random_model(config, torch.float32, torch.device("cpu"), 0)
    model.set_attn_implementation("eager")  # the counter does not know torch's fused attention on a CPU
    prompt, reply = 20, 12
    ids = torch.arange(prompt + reply - 1)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden[:, prompt - 1 :])
    n = prompt + reply - 1
    per_head = config.hidden_size // config.num_attention_heads
    masked = 4 * config.num_hidden_layers * config.num_attention_heads * per_head * (n * n - n * (n + 1) // 2)
    needed = sys.modules["roofline"].needed_flops(model, [(prompt, [reply])])
    assert needed == counter.get_total_flops() - masked  # eager attention also multiplies what it then masks
    twice = sys.modules["roofline"].needed_flops(model, [(prompt, [reply, reply])])
    alone = sys.modules["roofline"].needed_flops(model, [(prompt, [1])])
    head = 2 * model.get_output_embeddings().weight.numel()
    assert twice - needed == needed - alone + head  # the second reply costs what the first does, and no prompt again


def test_the_known_shape_is_that_of_the_real_configuration(bench, real_data):
    known, real = bench.model_config("qwen2-0.5b"), bench.model_config(str(real_data / "qwen2-0.5b"))
    for name in (*bench.SHAPES["qwen2-0.5b"], "rms_norm_eps", "rope_parameters", "max_position_embeddings"):
        assert getattr(known, name) == getattr(real, name), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "1"], "--prompts must be at least 2, not 1"),
        (["--positions", "0"], "--positions must be at least 1, not 0"),
        (["--threads", "0"], "--threads must be at least 1, not 0"),
        (["--prompts", "90000"], "give a smaller --prompts"),
        (["--model-config", "/nowhere"], "--model-config /nowhere: no config.json there"),
        (["--tokenizer", "/nowhere"], "no model at /nowhere"),
    ],
)
def test_a_user_error_is_one_line_that_names_its_remedy(bench, monkeypatch, arguments, message):
    with pytest.raises(UserError) as error:
        bench.main([*SMALL, *arguments, "--case", "long"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_without_a_tokenizer_the_command_says_what_to_give(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("SLMFAST_DATA", str(tmp_path))
    assert cli.main(["bench", "scoring", "--case", "long"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "give --tokenizer FOLDER" in said[0]


def test_a_device_that_is_not_there(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        bench.main(["--device", "cuda"])


def test_a_plan_of_memory_needs_no_weights(bench, capsys, monkeypatch):
    """By the model card Qwen2.5-7B has 7.62 billion parameters, and in bf16 does not fit 12 GiB."""
    monkeypatch.setattr(bench, "random_model", None)
    assert bench.main(["--plan", "--model-config", "qwen2.5-7b"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    small, middle, large = json.loads(last)["results"]
    gib = 1 << 30
    assert "does not fit" in small["case"] and small["ours"] * gib == pytest.approx(2 * 7.616e9, rel=1e-3)
    for row, size in ((middle, 24), (large, 80)):
        tokens = int(row["case"].partition(" tokens")[0].split()[-1])
        # Of a layer: a token's input eight times, three arrays of its MLP, and 16 keys and values of 4 heads of 128.
        layer = tokens * 2 * (8 * 3584 + 3 * 18944 + 16 * 2 * 4 * 128)
        assert small["ours"] + layer / gib < row["ours"] < small["ours"] + layer / gib + 0.1
        assert row["ours"] < size - 1.5
    assert bench.main(["--plan", "--model-config", str(MODEL), "--dtype", "float32"]) == 0
