"""Probes of a model run once, and again when its computation may have changed."""

import pytest
import torch

from slmfast.scoring.probes import remembered


@pytest.fixture
def asked():
    return []


@pytest.fixture
def probe(asked):
    def answer(model):
        asked.append(model)
        return len(asked) % 2 == 1

    return answer


def test_a_probe_runs_once_a_model(build_model, probe, asked):
    first, second = build_model(), build_model()
    assert [remembered(probe, model) for model in (first, first, second, first, second)] == [1, 1, 0, 1, 0]
    assert len(asked) == 2
    assert remembered(lambda model: True, second) is True, "another probe has an answer of its own"


CHANGES = {
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda *_: None),
    "a hook before": lambda model: model.model.register_forward_pre_hook(lambda *_: None),
    "a forward": lambda model: setattr(model.model.norm, "forward", lambda x: x),
    "a dtype": lambda model: model.to(torch.bfloat16),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "the configuration": lambda model: setattr(model.config, "sliding_window", 4),
    "a layer": lambda model: setattr(model.model, "norm", torch.nn.LayerNorm(64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_computation_asks_again(build_model, probe, asked, change):
    model = build_model()
    remembered(probe, model)
    CHANGES[change](model)
    assert remembered(probe, model) is False
    assert len(asked) == 2


def test_other_weights_do_not(build_model, probe, asked):
    model = build_model()
    remembered(probe, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    remembered(probe, model)
    assert len(asked) == 1


def test_a_model_that_goes_is_forgotten(build_model):
    import gc

    from slmfast.scoring import probes

    model = build_model()
    remembered(lambda model: True, model)
    before = len(probes._answers)
    del model
    gc.collect()
    assert len(probes._answers) == before - 1
