"""Which models may be packed, and what is said of the others."""

import pytest
import torch

from slmfast.doctor import findings
from slmfast.scoring import attention
from slmfast.scoring.attention import NAME, packed_attention
from slmfast.scoring.packable import why_not_packed

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}

NEXT = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
} | MOE


def built(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(1)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Qwen2Moe", MOE),
        ("Qwen3", {"head_dim": 8}),
        ("Mistral", {"sliding_window": 4}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}),
        ("Gemma3", {"head_dim": 8, "sliding_window": 2}),
    ],
)
def test_models_that_attend_by_the_registry_are_packed(name, more):
    name = "Gemma3" if name == "Gemma3" else name
    model = built(name, **SMALL, **HEADS, **more) if name != "Gemma3" else _gemma3(more)
    assert why_not_packed(model) is None


def _gemma3(more):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(1)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **HEADS, **more)).eval()


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "rotations"),
        ("Gemma2", {"head_dim": 8, "attn_logit_softcapping": 50.0}, "Gemma2Attention asks its attention for softcap"),
        ("Rwkv", {"attention_hidden_size": 32, "context_length": 64}, "does not run through transformers' registry"),
        ("Qwen3Next", NEXT, "layers of linear_attention"),
        # its attention never hears of its window, which only the mask shows
        (
            "Qwen2Moe",
            MOE | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2},
            "sliding window is in its mask alone",
        ),
    ],
)
def test_models_whose_scores_would_change_are_not(name, more, why):
    heads = {} if name == "Rwkv" else HEADS
    assert why in why_not_packed(built(name, **SMALL, **heads, **more))


def test_a_model_that_keeps_its_layout_to_itself_is_named(build_model):
    model = build_model()
    layer = model.model.layers[1].self_attn
    whole = layer.forward
    layer.forward = lambda *given, layout=None, **others: whole(*given, **others)
    assert "does not hand its attention" in why_not_packed(model)
    layer.forward = lambda hidden_states, position_embeddings, attention_mask, **few: whole(
        hidden_states, position_embeddings, attention_mask
    )
    assert "does not hand its attention" in why_not_packed(model)


def test_a_fault_of_the_code_is_not_taken_for_a_model_that_cannot(build_model, monkeypatch):
    model = build_model()
    monkeypatch.setattr(attention, "_variable_length", lambda *_: None)
    with pytest.raises(TypeError, match="not callable"):
        why_not_packed(model)


def test_a_model_that_ignores_its_layout_is_found_out(build_model, monkeypatch):
    model = build_model()
    inner = torch.nn.functional.scaled_dot_product_attention

    def ignores(module, query, key, value, attention_mask, **_):
        output = inner(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface

    assert why_not_packed(model) is None
    try:
        AttentionInterface.register(NAME, ignores)
        assert "other hidden states" in why_not_packed(model)
    finally:
        AttentionInterface.register(NAME, packed_attention)


def test_a_model_spread_over_devices_is_not_packed(build_model):
    model = build_model()
    model.model.layers[1].to("meta")
    assert "several devices" in why_not_packed(model)


def test_doctor_says_how_a_model_is_scored(model_folder, tokenizer, tmp_path):
    assert dict(findings(str(model_folder)))["scoring"].endswith("in packs, prompts shared by their replies")
    rotation = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    built("Llama", **SMALL, **HEADS, rope_parameters=rotation).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "for its rotations depend" in dict(findings(str(tmp_path)))["scoring"]
    assert "scoring" not in dict(findings())
