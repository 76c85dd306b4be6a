"""Identities of the weighted average, and update_survival against its definition."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slmfast import fusion_pieces
from slmfast.errors import UserError
from slmfast.fusion import fuse, update_survival
from slmfast.model_folder import ModelWeights, write_typed_tensors

SHAPES = {
    "model.embed_tokens.weight": (40, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.norm.weight": (8,),
}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}
    made["model.norm.weight"][:3] = torch.tensor([-0.0, 1e-42, 3e38])  # signed zero, subnormal, near the largest
    return made


def save(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1, **config) -> Path:
    """Saves a bare model folder: weights, config and a tokenizer file."""
    folder.mkdir(parents=True)
    meta = {"format": "pt"}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata=meta)
    else:
        files = {name: f"model-{i % shards:05d}.safetensors" for i, name in enumerate(weights)}
        for file in set(files.values()):
            save_file({n: t for n, t in weights.items() if files[n] == file}, folder / file, metadata=meta)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "eos_token_id": 2, **config}))
    (folder / "tokenizer.json").write_text('{"of": "%s"}' % folder.name)  # noqa: UP031
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def models(tmp_path):
    return [save(tmp_path / name, tensors(seed)) for seed, name in enumerate(["S1", "S2", "S3"])]


def bits(folder: Path) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in load_file(folder / "model.safetensors").items()}


def test_one_model_alone_comes_back_bit_for_bit(models, tmp_path):
    fuse(dict(zip(models, (1, 0, 0), strict=True)), tmp_path / "fused")
    assert bits(tmp_path / "fused") == bits(models[0])
    fuse(dict(zip(models, (0, 0, 0.3), strict=True)), tmp_path / "last")
    assert bits(tmp_path / "last") == bits(models[2])


def test_equal_models_give_themselves(models, tmp_path):
    copies = [shutil.copytree(models[0], tmp_path / f"copy{i}") for i in range(3)]
    fuse(dict.fromkeys(copies, 1), tmp_path / "fused")
    assert bits(tmp_path / "fused") == bits(models[0])


def test_order_and_scale_of_the_weights_do_not_matter(models, tmp_path):
    weights = (0.2, 0.5, 0.3)
    fuse(dict(zip(models, weights, strict=True)), tmp_path / "forward")
    fuse(dict(reversed(list(zip(models, weights, strict=True)))), tmp_path / "backward")
    assert bits(tmp_path / "forward") == bits(tmp_path / "backward")


def test_equals_the_average_in_float64(models, tmp_path):
    fuse(dict(zip(models, (2, 1, 1), strict=True)), tmp_path / "fused")
    parts = [load_file(model / "model.safetensors") for model in models]
    for name, found in load_file(tmp_path / "fused" / "model.safetensors").items():
        expected = np.average([part[name].numpy().astype(np.float64) for part in parts], axis=0, weights=[2, 1, 1])
        assert np.array_equal(found.numpy(), expected.astype(np.float32)), name


def test_the_result_is_a_complete_folder_with_a_card(models, tmp_path):
    card = fuse(dict(zip(models, (1, 1, 2), strict=True)), tmp_path / "fused")
    folder = tmp_path / "fused"
    assert json.loads((folder / "config.json").read_text()) == {"dtype": "float32", "eos_token_id": 2}
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert (folder / "tokenizer.json").read_text() == '{"of": "S1"}'
    assert (folder / "chat_template.jinja").exists()
    assert json.loads((folder / "fusion.json").read_text()) == card
    assert [(part["name"], part["weight"]) for part in card["parts"]] == [("S1", 0.25), ("S2", 0.25), ("S3", 0.5)]


def test_shards_and_low_precision_parts_are_read(models, tmp_path):
    sharded = save(tmp_path / "sharded", tensors(1), shards=2)
    assert bits(fused(tmp_path / "a", {models[0]: 1, sharded: 1})) == bits(
        fused(tmp_path / "b", {models[0]: 1, models[1]: 1})
    )
    low = save(tmp_path / "low", {name: t.bfloat16() for name, t in tensors(1).items()})
    found = load_file(fused(tmp_path / "c", {low: 1}) / "model.safetensors")
    assert all(torch.equal(found[name], t.bfloat16().float()) for name, t in tensors(1).items())


@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_change_no_bit(tmp_path, monkeypatch, threads):
    generator = torch.Generator().manual_seed(5)
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    made = [torch.randn(61, 7, generator=generator).to(kind) for kind in kinds]
    parts = [save(tmp_path / f"m{number}", {"a": t, "b": t[:1].clone()}) for number, t in enumerate(made)]
    shares = [0.1, 0.2, 0.3, 0.4]
    expected = sum(t.double().numpy() * share for t, share in zip(made, shares, strict=True)).astype(np.float32)
    monkeypatch.setattr(fusion_pieces, "PIECE", 5)  # 427 and 7 elements are no multiples of it
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        card = fuse(dict(zip(parts, shares, strict=True)), tmp_path / "fused", mixed_dtypes=True)
    finally:
        torch.set_num_threads(before)
    found = load_file(tmp_path / "fused" / "model.safetensors")
    assert np.array_equal(found["a"].numpy(), expected) and np.array_equal(found["b"].numpy(), expected[:1])
    assert len({part["digest"] for part in card["parts"]}) == 4


def test_the_digest_of_a_part_tells_its_tensors_and_not_their_files(models, tmp_path):
    sharded = save(tmp_path / "sharded", tensors(0), shards=2)
    changed = tensors(0)
    changed["model.norm.weight"][7] += 1e-6
    other = save(tmp_path / "other", changed)
    card = fuse({models[0]: 1, sharded: 0, other: 1}, tmp_path / "fused")
    whole, shards, differs = (part["digest"] for part in card["parts"])
    assert whole == shards != differs and len(whole) == 32


def test_a_piece_that_has_no_average_is_blamed_on_its_model(models, tmp_path, monkeypatch):
    monkeypatch.setattr(fusion_pieces, "PIECE", 5)
    for bad in (float("inf"), float("nan")):
        weights = tensors(5)
        weights["model.embed_tokens.weight"][39, 7] = bad
        broken = save(tmp_path / f"broken{bad}", weights)
        with pytest.raises(UserError, match=rf"tensor model\.embed_tokens\.weight of .*broken{bad} holds values"):
            fuse({models[0]: 1, broken: 0.5}, tmp_path / "fused")
        fuse({models[0]: 1, broken: 0}, tmp_path / f"without{bad}")  # what has no weight does no harm
        assert bits(tmp_path / f"without{bad}") == bits(models[0])
    whole = save(tmp_path / "whole", {"model.norm.weight": torch.ones(8, dtype=torch.int64)})
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight of .*whole holds values that have no average"):
        fuse({whole: 1}, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def fused(output: Path, models: dict) -> Path:
    fuse(models, output)
    return output


def test_a_copy_of_the_tied_head_is_no_tensor_of_its_own(models, tmp_path):
    weights = tensors(1)
    doubled = save(
        tmp_path / "doubled",
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        tie_word_embeddings=True,
    )
    both = fused(tmp_path / "fused", {models[0]: 1, doubled: 1})
    assert bits(both) == bits(fused(tmp_path / "plain", {models[0]: 1, models[1]: 1}))
    with pytest.raises(UserError, match=r"S1 has no tensor lm_head.weight"):
        fuse({models[0]: 1, save(tmp_path / "untied", load_file(doubled / "model.safetensors")): 1}, tmp_path / "no")


def test_models_that_do_not_match_are_named(models, tmp_path):
    weights = tensors(5)
    weights["model.norm.weight"] = torch.ones(9)
    odd = save(tmp_path / "odd", weights)
    with pytest.raises(UserError, match=r"model\.norm\.weight is \[8\] in .*S1 and \[9\] in .*odd"):
        fuse({models[0]: 1, odd: 1}, tmp_path / "fused")
    weights = tensors(5)
    weights["model.norm.weight"][1] = float("nan")
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight of .*broken holds values"):
        fuse({models[0]: 1, save(tmp_path / "broken", weights): 1}, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def tokenizer(*tokens, added=()):
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)]
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": made})


def test_equal_shapes_of_different_kinds_are_no_parts_of_one_model(models, tmp_path):
    first, second = models[:2]
    (first / "tokenizer.json").write_text(tokenizer("a", "b", "c"))
    (second / "tokenizer.json").write_text(tokenizer("a", "b", "c", added=["<pad>"]))
    fuse({first: 1, second: 1}, tmp_path / "one")  # a token more, beyond the others, changes none of them
    (second / "tokenizer.json").write_text(tokenizer("a", "c", "b"))
    with pytest.raises(UserError, match=r"S1 and .*S2 have different vocabularies \(token 1 is 'b' and 'c'\)"):
        fuse({first: 1, second: 1}, tmp_path / "fused")
    heads = [save(tmp_path / f"h{n}", tensors(n), num_attention_heads=n) for n in (2, 4)]
    with pytest.raises(UserError, match=r"num_attention_heads is 2 in .*h2 and 4 in .*h4: take models of one arch"):
        fuse(dict.fromkeys(heads, 1), tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("weight", [-0.1, float("nan"), True, "half"])
def test_bad_weights_are_named(models, tmp_path, weight):
    with pytest.raises(UserError, match=r"the fusion weight of .*S2 is"):
        fuse({models[0]: 1, models[1]: weight}, tmp_path / "fused")


def test_a_model_under_two_spellings_is_refused(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("S1")
    for spelling in ("./S1", Path("S1"), "S1/", "S2/../S1", str(models[0]), "link"):
        with pytest.raises(UserError, match="is named twice among the models"):
            fuse({"S2": 2, "S1": 1, spelling: 1}, "fused")
    assert not Path("fused").exists()


def test_any_real_number_is_a_weight_and_a_list_is_none(models, tmp_path):
    card = fuse({models[0]: np.float32(0.5), models[1]: np.int64(1), models[2]: 0.5}, tmp_path / "fused")
    assert [part["weight"] for part in card["parts"]] == [0.25, 0.5, 0.25]
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text()) == card
    for bare in (models, str(models[0]), None):
        with pytest.raises(UserError, match=r"models is a .*: give model folders with their weights"):
            fuse(bare, tmp_path / "bare")


def test_nothing_to_fuse_and_nowhere_to_put_it(models, tmp_path):
    with pytest.raises(UserError, match="no model to fuse"):
        fuse({}, tmp_path / "fused")
    with pytest.raises(UserError, match="all fusion weights are 0"):
        fuse({models[0]: 0}, tmp_path / "fused")
    with pytest.raises(UserError, match="is also an input"):
        fuse({models[0]: 1}, models[0])
    with pytest.raises(UserError, match=r"holds no fusion\.json"):
        fuse({models[0]: 1}, models[1])
    with pytest.raises(UserError, match=r"fused lies in the input .*S1: choose another output folder"):
        fuse({models[0]: 1}, models[0] / "fused")


def test_an_input_inside_the_output_stays(models, tmp_path):
    fuse({models[0]: 1}, tmp_path / "fused")
    inner = save(tmp_path / "fused" / "inner", tensors(4))
    with pytest.raises(UserError, match=r"fused holds the input .*inner: choose another output folder"):
        fuse({inner: 1, models[0]: 1}, tmp_path / "fused")
    assert (inner / "model.safetensors").is_file()
    with pytest.raises(UserError, match="nowhere is no model folder"):
        fuse({tmp_path / "nowhere": 1}, tmp_path / "fused")
    with pytest.raises(UserError, match="dtype is 'int8'"):
        fuse({models[0]: 1}, tmp_path / "fused", dtype="int8")


def nudged(folder: Path, base: dict[str, torch.Tensor], size: float) -> Path:
    """A model whose every weight lies `size` above the base's, where fp32 can tell."""
    return save(folder, {name: t + size for name, t in base.items()})


def moderate(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_survival_is_what_its_definition_says(tmp_path, dtype, size):
    base = moderate(1)
    tuned = nudged(tmp_path / "tuned", base, size)
    found = update_survival(save(tmp_path / "base", base), tuned, dtype)

    b = torch.cat([t.flatten() for t in base.values()])
    t = torch.cat([load_file(tuned / "model.safetensors")[name].flatten() for name in base])
    kind = getattr(torch, dtype)
    rounded_b, rounded_t = (x.to(kind).to(torch.float64).numpy() for x in (b, t))
    b, t = b.double().numpy(), t.double().numpy()
    moved = b != t
    assert found.weights == pytest.approx(np.mean((rounded_b != rounded_t)[moved]))
    assert found.norm == pytest.approx(np.dot(rounded_t - rounded_b, t - b) / np.dot(t - b, t - b))


def test_float32_keeps_all_and_bf16_next_to_nothing_of_a_small_update(tmp_path):
    base = save(tmp_path / "base", {name: t.bfloat16() for name, t in moderate(2).items()})
    exact = {name: t.bfloat16().float() for name, t in moderate(2).items()}
    tuned = nudged(tmp_path / "tuned", exact, 1e-7)
    assert update_survival(base, tuned, "float32").weights == 1.0
    assert update_survival(base, tuned, torch.bfloat16).weights < 0.02
    assert update_survival(base, base, "bfloat16") == (1.0, 1.0)  # there is nothing to lose


def test_what_overflows_a_type_is_lost_and_never_nan(tmp_path):
    base = save(tmp_path / "base", {"w": torch.tensor([1.0, 60000.0, 70000.0, 80000.0])})
    tuned = save(tmp_path / "tuned", {"w": torch.tensor([1.5, 70000.0, 60000.0, 81000.0])})
    found = update_survival(base, tuned, "float16")
    assert found.weights == 0.25 and found.norm == pytest.approx(0.25 / (0.25 + 2e8 + 1e6))
    with pytest.raises(UserError, match="has an average beyond the range of"):
        fuse({tuned: 1}, tmp_path / "fused", dtype="float16")
    assert not (tmp_path / "fused").exists()
    broken = save(tmp_path / "broken", {"w": torch.tensor([1.0, torch.nan, 0.0, 0.0])})
    with pytest.raises(UserError, match="NaN or infinite"):
        update_survival(base, broken, "bfloat16")


def test_a_coarser_fusion_says_what_survives(tmp_path, capsys):
    base = save(tmp_path / "base", moderate(3))
    tuned = nudged(tmp_path / "tuned", moderate(3), 1e-5)
    card = fuse({tuned: 1}, tmp_path / "fused", dtype="bfloat16", base=base)
    expected = update_survival(base, tuned, "bfloat16")
    assert card["update_survival"] == {"base": "base", "weights": expected.weights, "norm": expected.norm}
    assert f"{expected.weights:.2%} of the weights that moved from base" in capsys.readouterr().err
    assert load_file(tmp_path / "fused" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_writer_makes_files_that_safetensors_reads(tmp_path):
    made = {
        "a": torch.arange(7, dtype=torch.uint8),
        "b": torch.randn(3, 5).bfloat16(),
        "c": torch.tensor(2.5, dtype=torch.float64),
        "d": torch.zeros(0, 4),
        "e": torch.randn(4, 6).t(),  # not contiguous
    }
    layout = {name: (t.dtype, tuple(t.shape)) for name, t in made.items()}
    write_typed_tensors(tmp_path / "x.safetensors", layout, made.values())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == made.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in made.items())


def test_damaged_weights_are_named(models):
    path = models[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="can't be read as safetensors"), ModelWeights(models[0]) as weights:
        weights["model.norm.weight"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json is damaged"),
        ("[]", "index.json holds no JSON object"),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": {"x": "model-00000.safetensors"}}', "model-00000.safetensors has no tensor x though"),
        ('{"weight_map": {"x": "model-9.safetensors"}}', "model-9.safetensors is missing though"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, text, message):
    folder = save(tmp_path / "parts", tensors(0), shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ModelWeights(folder)


def test_parts_of_different_types_are_refused_unless_asked_for(models, tmp_path):
    coarse = save(tmp_path / "coarse", {n: t.bfloat16() for n, t in load_file(models[1] / "model.safetensors").items()})
    with pytest.raises(UserError, match=r"tensor .* is float32 in .* and bfloat16 in .*coarse.*--mixed-dtypes"):
        fuse({models[0]: 1, coarse: 1}, tmp_path / "fused")
    fuse({models[0]: 1, coarse: 1}, tmp_path / "fused", mixed_dtypes=True)
    one, two, average = (load_file(path / "model.safetensors") for path in (models[0], coarse, tmp_path / "fused"))
    for name in average:
        wanted = (one[name].double() / 2 + two[name].double() / 2).float()
        assert torch.equal(average[name], wanted)


def test_another_fused_model_is_not_replaced(models, tmp_path):
    fuse({models[0]: 1, models[1]: 1}, tmp_path / "fused")
    fuse({models[0]: 2, models[1]: 2}, tmp_path / "fused")  # the same one
    with pytest.raises(UserError, match=r"fused holds another fused model: give another output, or remove it"):
        fuse({models[0]: 1, models[1]: 2}, tmp_path / "fused")
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text())["parts"][1]["weight"] == 0.5


def test_the_weights_of_a_card_give_that_card_again(models, tmp_path):
    card = fuse({models[0]: 0.1, models[1]: 0.1, models[2]: 0.6}, tmp_path / "fused")
    weights = [part["weight"] for part in card["parts"]]
    assert weights != [weight / math.fsum(weights) for weight in weights]  # such that normalising again changes them
    assert fuse(dict(zip(models, weights, strict=True)), tmp_path / "fused") == card
