"""What a few tokens have told of a model, so that they need not be run before every call."""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from slmfast.scoring.loading import evaluating

Answer = TypeVar("Answer")
_answers: WeakKeyDictionary[nn.Module, dict[Callable[[nn.Module], Any], tuple[Any, Any]]] = WeakKeyDictionary()


def remembered(probe: Callable[[nn.Module], Answer], model: nn.Module) -> Answer:
    """What the probe says of a model; it runs again once the model's computation may be another one.

    That is its configuration, its mode of attention, the types and devices of its parameters, its hooks, and forwards
    that were put on single modules. Weights may change, as in training: no probe depends on them.
    """
    with evaluating(model):  # alone: what another thread changes while it scores is none of the model's own
        state = _computation(model)
        known = _answers.setdefault(model, {})
        if probe not in known or known[probe][0] != state:
            known[probe] = state, probe(model)
        return known[probe][1]


def _computation(model: nn.Module) -> tuple:
    modules = []
    for module in model.modules():
        hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
        # By their ids: the things themselves may hold the model, which would then never go.
        modules.append((type(module), id(vars(module).get("forward")), *map(id, hooks)))
    parameters = {(parameter.dtype, parameter.device, parameter.ndim) for parameter in model.parameters()}
    config = model.config.get_text_config()
    return modules, parameters, config.to_json_string(use_diff=False), config._attn_implementation
