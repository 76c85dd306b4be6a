"""Model cards: what they say, and that nothing depends on them."""

import re
from pathlib import Path

import yaml

from slmfast.fusion import fuse
from slmfast.reporting.model_card import model_title, write_training_card
from slmfast.store import model_digest, output_digests, write_json


def parts(text: str) -> tuple[dict, str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def made(folder: Path, start: Path) -> str:
    folder.mkdir(parents=True)
    shares = {"weights": 0.5, "norm": 0.25}
    card = {"method": "kto", "settings": {"method": "kto", "learning_rate": 1e-8, "batch_size": 4, "accumulation": 250}}
    card |= {"seed": 3, "rows": 1200, "rows_over_the_window": 7, "steps": 20}
    card |= {"forward_sees": shares, "bfloat16_keeps": {"weights": 0.1, "norm": 0.011}}
    write_training_card(
        folder,
        start=start,
        reference=start,
        weights=494_032_768,
        data_digest="d" * 32,
        card=card,
        history=[{"step": i, "loss": 0.5 - i / 100} for i in range(1, 21)],
        versions={"torch": "1.2.3"},
    )
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_training_card_says_what_was_done_and_is_the_same_anywhere(tmp_path):
    starts = [tmp_path / place / "S1" for place in ("here", "there")]
    for start in starts:
        start.mkdir(parents=True)
        (start / "config.json").write_text("{}")
    texts = [made(tmp_path / f"out-{i}", start) for i, start in enumerate(starts)]
    assert texts[0] == texts[1] and str(tmp_path) not in texts[0]
    front, body = parts(texts[0])
    assert front["library_name"] == "transformers" and front["tags"] == ["slmfast", "kto"]
    for row in ("| weights | 494,032,768 |", "| training rows | 1,200 |", "| loss, first step | 0.4900 |"):
        assert row in body
    assert "| loss, mean of the last tenth | 0.3050 |" in body  # steps 19 and 20
    assert "| share of the update's norm that bfloat16 would keep | 1.1 % |" in body
    assert "--set learning\\_rate" not in body and "--set learning_rate=1e-08" in body


def test_a_hub_snapshot_is_called_by_its_hub_name():
    assert model_title(Path("/x/models--Qwen--Qwen2-0.5B/snapshots/abc")) == "Qwen/Qwen2-0.5B@abc"
    assert model_title(Path("/x/runs/S1")) == "S1"


def test_nothing_depends_on_a_card(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    write_json(model / "config.json", {})
    before = model_digest(model), output_digests(tmp_path)
    (model / "README.md").write_text("words")
    assert (model_digest(model), output_digests(tmp_path)) == before


def test_a_fused_model_has_a_card_of_its_own(tmp_path):
    base = Path(__file__).parent.parent / "slmfast" / "miniature" / "models" / "small"
    other = tmp_path / "other"
    fuse({base: 1}, other)
    fuse({base: 1, other: 3}, tmp_path / "fused", mixed_dtypes=True)
    front, body = parts((tmp_path / "fused" / "README.md").read_text(encoding="utf-8"))
    assert front["tags"] == ["slmfast", "fusion"] and "# Average of small, other" in body
    assert "| small | 0.2500 |" in body and "| other | 0.7500 |" in body


def test_the_command_of_a_fused_model_gives_its_own_weights_back(tmp_path):
    base = Path(__file__).parent.parent / "slmfast" / "miniature" / "models" / "small"
    fuse({base: 1}, tmp_path / "other")
    card = fuse({base: 1, tmp_path / "other": 6}, tmp_path / "fused", mixed_dtypes=True)
    assert "--dtype float32 --mixed-dtypes -o" in (tmp_path / "fused" / "README.md").read_text()
    command = re.search("slmfast fuse (.*) --dtype", (tmp_path / "fused" / "README.md").read_text()).group(1)
    weights = [float(part.partition("=")[2]) for part in command.split()]
    assert [weight / sum(weights) for weight in weights] == [part["weight"] for part in card["parts"]] == [1 / 7, 6 / 7]


def test_a_coarser_model_is_not_called_fp32(tmp_path):
    base = Path(__file__).parent.parent / "slmfast" / "miniature" / "models" / "small"
    fuse({base: 1}, tmp_path / "coarse", dtype="bfloat16", base=base)
    _, body = parts((tmp_path / "coarse" / "README.md").read_text(encoding="utf-8"))
    assert 'dtype="bfloat16")' in body and "stored in bfloat16" in body and "Load it in fp32" not in body
