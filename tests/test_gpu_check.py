"""bench/gpu_check.py on a CPU: what it checks, what it runs and what it writes; only the CUDA calls are left out."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from slmfast.kernels import reference

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def check(monkeypatch):
    """The script as a module, with small cases, small matrices and our eager twin for a kernel."""
    monkeypatch.syspath_prepend(BENCH)
    spec = importlib.util.spec_from_file_location("bench_gpu_check", BENCH / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    kernels = sys.modules["kernel_checks"]
    monkeypatch.setattr(module, "KERNELS", [kernels.Kernel("eager twin", "slmfast.kernels.reference")])
    monkeypatch.setattr(module, "CASES", SMALL(kernels))
    monkeypatch.setattr(module, "check_optimizer", lambda device: [])
    monkeypatch.setattr(module, "copy_rate", lambda device: 1e9)
    monkeypatch.setattr(module, "matrix_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(module, "BENCHMARKS", ())
    return module


def SMALL(kernels):
    return [
        kernels.Case(n, h, v, dtype, strided)
        for n, h, v in ((1, 8, 2), (5, 33, 773), (130, 40, 300))
        for dtype in kernels.DTYPES
        for strided in (False, True)
    ]


def run(check, tmp_path, capsys, *arguments: str) -> tuple[int, dict, str]:
    options = check.parser().parse_args(["--out", str(tmp_path / "check.json"), *arguments])
    code = check.run(options, torch.device("cpu"))
    *before, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert json.loads((tmp_path / "check.json").read_text()) == document
    return code, document, "\n".join(before)


def test_without_a_cuda_device_it_says_so_in_one_line(check, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "no CUDA device" in captured.err


def test_a_right_kernel_passes_in_every_dtype(check, tmp_path, capsys):
    code, document, before = run(check, tmp_path, capsys)
    rows = [row for row in document["kernels"] if row["passed"] is not None]
    assert code == 0 and len(rows) >= len(check.CASES) and all(row["passed"] for row in rows)
    assert f"kernels: {len(rows)} checks passed" in before
    assert document.keys() == {
        "device",
        "commit",
        "versions",
        "kernels",
        "roofline",
        "notes",
        "benchmarks",
        "seconds",
    }


@pytest.mark.parametrize("wrong", [False, True])
def test_an_optimizer_that_gives_other_bits_fails(check, tmp_path, capsys, monkeypatch, wrong):
    """One bit of one weight, in the second of the two sides that are compared."""
    checks = sys.modules["optimizer_checks"]
    right, calls = checks.adamw8bit, []

    def step(high, low, *more):
        right(high, low, *more)
        calls.append(low)
        if wrong and len(calls) % 2 == 0:
            low[-1] ^= 1

    monkeypatch.setattr(checks, "adamw8bit", step)
    monkeypatch.setattr(check, "check_optimizer", lambda device: checks.check_optimizer(device, (1, 700)))
    code, document, _ = run(check, tmp_path, capsys)
    rows = [row for row in document["kernels"] if row["kernel"] == "adamw8bit"]
    assert len(rows) == 4 and all(row["passed"] is not wrong for row in rows) and code == int(wrong)


def off_by_a_row(hidden, weight, targets):
    return reference.linear_logprob(hidden, weight, (targets + 1) % len(weight))


def one_place_unwritten(hidden, weight, targets):
    found = torch.empty(len(targets))
    found[:-1] = reference.linear_logprob(hidden, weight, targets)[:-1]
    return found


def last_column_left_out(hidden, weight, targets):
    logits = hidden.float() @ weight.float().T
    total = logits[:, :-1].logsumexp(1) if len(weight) > 1 else logits.logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - total


def summed_in_low_precision(hidden, weight, targets):
    logits = (hidden.bfloat16() @ weight.bfloat16().T).log_softmax(-1)
    return logits.gather(1, targets[:, None])[:, 0].float()


@pytest.mark.parametrize("wrong", [off_by_a_row, one_place_unwritten, last_column_left_out, summed_in_low_precision])
def test_a_wrong_kernel_fails(check, tmp_path, capsys, monkeypatch, wrong):
    monkeypatch.setattr(reference, "wrong", wrong, raising=False)
    kernel = sys.modules["kernel_checks"].Kernel("wrong", "slmfast.kernels.reference", "wrong")
    monkeypatch.setattr(check, "KERNELS", [kernel])
    code, document, before = run(check, tmp_path, capsys)
    assert code == 1 and any(row["passed"] is False for row in document["kernels"])
    assert "wrong" in before and "False" in before


def with_entropy(hidden, weight, targets, *, entropy=False):
    logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
    picked = logprobs.gather(1, targets[:, None])[:, 0]
    return (picked, -(logprobs.exp() * logprobs).sum(1)) if entropy else picked


def base_two_entropy(hidden, weight, targets, *, entropy=False):
    picked, nats = with_entropy(hidden, weight, targets, entropy=True)
    return (picked, nats / 0.6931) if entropy else picked


@pytest.mark.parametrize(("call", "right"), [(with_entropy, True), (base_two_entropy, False)])
def test_entropy_is_checked_where_a_kernel_gives_it(check, monkeypatch, call, right):
    kernels = sys.modules["kernel_checks"]
    monkeypatch.setattr(reference, "given", call, raising=False)
    kernel = kernels.Kernel("given", "slmfast.kernels.reference", "given")
    rows = kernels.check_all([kernel], check.CASES, torch.device("cpu"))
    by_output = {output: [row for row in rows if row["output"] == output] for output in ("logprob", "entropy")}
    assert len(rows) == 3 * len(check.CASES) and all(row["passed"] for row in by_output["logprob"])
    assert all(row["passed"] for row in by_output["entropy"]) is right


def test_the_truth_is_a_plain_softmax(check):
    kernels = sys.modules["kernel_checks"]
    hidden, weight, targets = kernels.inputs(kernels.Case(70, 9, 31, torch.float32), torch.device("cpu"), 0)
    logprob, entropy = kernels.truth(hidden, weight, targets)
    distribution = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T)
    torch.testing.assert_close(logprob, distribution.log_prob(targets), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, distribution.entropy(), rtol=0, atol=1e-12)


def test_a_kernel_that_is_not_there_is_said_and_is_no_failure(check, tmp_path, capsys, monkeypatch):
    kernel = sys.modules["kernel_checks"].Kernel("later", "slmfast.kernels.not_there")
    monkeypatch.setattr(check, "KERNELS", [kernel])
    code, document, before = run(check, tmp_path, capsys)
    assert code == 0 and [row["passed"] for row in document["kernels"]] == [None]
    assert "slmfast.kernels.not_there is not in this checkout" in before


FAKE = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"arguments": sys.argv[1:]}))
if "slow" in sys.argv:
    time.sleep(600)
if "failing" in sys.argv:
    raise SystemExit("out of luck")
"""


@pytest.fixture
def benchmarks(check, monkeypatch, tmp_path):
    """Puts benchmarks of a fake script in the place of the real ones."""
    monkeypatch.setattr(check, "BENCH", tmp_path)
    (tmp_path / "fake.py").write_text(FAKE)

    def put(*arguments: str, share: float = 1.0, **options) -> None:
        monkeypatch.setattr(check, "BENCHMARKS", [check.Benchmark("fake", arguments, share, **options)])

    return put


def test_a_benchmark_is_run_with_the_tokenizer_and_its_document_kept(check, benchmarks, tmp_path, capsys):
    benchmarks("fake", "--case", "long", tokenizer=True)
    code, document, _ = run(check, tmp_path, capsys, "--tokenizer", "some/folder")
    arguments = document["benchmarks"]["fake"]["arguments"]
    assert code == 0 and arguments[:2] == ["--case", "long"] and arguments[-2:] == ["--tokenizer", "some/folder"]


def test_a_benchmark_that_fails_is_named_and_keeps_what_it_wrote(check, benchmarks, tmp_path, capsys):
    benchmarks("fake", "failing")
    code, document, _ = run(check, tmp_path, capsys)
    assert code == 1 and document["benchmarks"]["fake"]["failed"] == "exit code 1: out of luck"
    assert "arguments" in document["benchmarks"]["fake"]


def test_a_benchmark_that_takes_too_long_is_stopped(check, benchmarks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "LEAST_SECONDS", 0.0)
    benchmarks("fake", "slow", share=0.1)
    code, document, _ = run(check, tmp_path, capsys, "--seconds", "20")
    assert code == 0 and "after 2 s" in document["benchmarks"]["fake"]["stopped"]
    assert "arguments" in document["benchmarks"]["fake"]


def test_what_is_not_there_or_does_not_fit_is_said(check, benchmarks, tmp_path, capsys):
    benchmarks("nowhere")
    code, document, _ = run(check, tmp_path, capsys)
    assert code == 0 and document["benchmarks"]["fake"] == {"missing": "bench/nowhere.py is not in this checkout"}
    benchmarks("fake")
    _, document, _ = run(check, tmp_path, capsys, "--seconds", "10")
    assert "s were left" in document["benchmarks"]["fake"]["missing"]


def test_the_real_benchmarks_are_the_three_of_the_command_line(check, monkeypatch):
    original = importlib.util.spec_from_file_location("fresh_gpu_check", BENCH / "gpu_check.py")
    fresh = importlib.util.module_from_spec(original)
    monkeypatch.setitem(sys.modules, original.name, fresh)
    original.loader.exec_module(fresh)
    assert {benchmark.arguments[0] for benchmark in fresh.BENCHMARKS} == {"dedup", "scoring", "training"}
    for benchmark in fresh.BENCHMARKS:
        if benchmark.script.exists():  # its own parser takes what it is given
            spec = importlib.util.spec_from_file_location(f"parsed_{benchmark.arguments[0]}", benchmark.script)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
            given = [*benchmark.arguments[1:], "--out", "figures.json"]
            module.parser().parse_args([*given, *(["--tokenizer", "folder"] if benchmark.tokenizer else [])])


def test_without_real_data_the_miniatures_tokenizer_serves_and_the_json_says_so(check, monkeypatch):
    monkeypatch.setattr(check, "data_folder", lambda: None)
    folder, note = check.chosen_tokenizer(None)
    assert (Path(folder) / "tokenizer.json").exists() and "miniature" in note
    assert check.chosen_tokenizer("given") == ("given", None)
