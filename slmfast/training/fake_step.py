"""One full-size step of training on tensors without values: what memory it takes on a CUDA device.

The step is the real one: the model's own code, our layers, passes, objectives, masters and optimizers, under torch's
FakeTensorMode. Nothing is computed, and a 24 GB step is counted in seconds on any machine. What CUDA's libraries take
for themselves is not seen: a plan leaves room for it.
"""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from slmfast.errors import UserError
from slmfast.kernels.dynamic_codes import BLOCK
from slmfast.training.data import TokenSet
from slmfast.training.extras import add_adapters
from slmfast.training.kto import KtoObjective
from slmfast.training.live_bytes import LiveBytes
from slmfast.training.optimizer import is_too_coarse, make_optimizer
from slmfast.training.passes import Passes, split_weights
from slmfast.training.settings import TrainSettings
from slmfast.training.sft import SftObjective
from slmfast.training.split_adamw import coarse_blocks
from slmfast.training.split_weights import splittable

WEIGHTS, GRADIENTS, STATES, ACTIVATIONS, TEMPORARIES = KINDS = (
    "weights",
    "gradients",
    "optimizer states",
    "activations",
    "temporaries",
)
"""The rows of a plan. Activations are what a forward pass keeps for its backward pass; temporaries all else that is
new at the peak: a checkpointed layer run again, the head's working memory, what a step of the optimizer computes."""

DEVICE = torch.device("cpu")  # where fake tensors lie; they stand for CUDA's


class Unplannable(UserError):
    """A model whose code can't run without values, or a configuration of none."""


class FakeRun:
    """A training run of `settings` on a model of `config`, whose steps are counted and not computed.

    Args:
        config: of a causal language model.
        settings: the method, the optimizer, the forward's precision and the loss are taken from them.
        coarse: by the parameter's name, how many of its blocks of 256 weights are compensated, as `coarse_weights`
            counts them; any number stands for all of a tensor that is not split.
        frozen: names of the parameters that are not trained.

    Raises:
        Unplannable: the model's code asks for values, or fails otherwise.
    """

    def __init__(self, config: Any, settings: TrainSettings, coarse: Mapping[str, int], frozen: Collection[str] = ()):
        self._settings, self._mode = settings, FakeTensorMode(allow_non_fake_inputs=True)
        self._live = LiveBytes()
        self.forward = settings.forward
        """The precision of the passes."""
        with self._inside():
            self.model = fake_model(config).eval()
            if settings.lora_rank:
                add_fake_adapters(self.model, settings)
            for name, parameter in self.model.named_parameters():
                if name in frozen:
                    parameter.requires_grad_(False)
            self._masters = split_weights(self.model, settings.forward) if settings.splits_weights else None
            self._optimizer = self._make_optimizer()
            self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
            self._step()  # makes the states
            self._compensate(coarse)
        self._tell_kinds()
        self.step_peak = self._measured(self._step)
        """Bytes of each kind when the optimizer's step takes most."""

    def pass_peak(self, pack_tokens: int, checkpointing: bool, longest: int) -> dict[str, int]:
        """Bytes of each kind when the passes over full packs take most: gradients and states are all there by then.

        Args:
            pack_tokens: the most tokens of a pack.
            longest: the tokens of the longest sequence, which may be more than a pack's.
        """
        passes = Passes(self._settings.forward, checkpointing, DEVICE)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        tokens = full_packs(self._settings.method, pack_tokens, longest, vocabulary)
        groups = [range(len(tokens))]

        def accumulate() -> None:
            if self._settings.method == "sft":
                objective = SftObjective(tokens, groups, passes)
            else:
                objective = KtoObjective(tokens, groups, self._settings, passes)
                objective.set_reference(torch.zeros(2, len(tokens), dtype=torch.float64))
            objective.accumulate(self.model, [0], pack_tokens, self._backward)

        return self._measured(accumulate)

    def _backward(self, loss: Tensor) -> None:
        self._live.rename_new(ACTIVATIONS)
        loss.backward()

    def _step(self) -> None:
        if self._settings.clip:
            torch.nn.utils.clip_grad_norm_(self._trained, self._settings.clip)
        self._optimizer.step()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        # bitsandbytes makes its tables of codes, 2 KB, from values.
        with unset_fake_temporarily() if self._settings.optimizer == "adamw8bit" else nullcontext():
            return make_optimizer(self.model, self._settings, 1, self._masters)

    def _compensate(self, coarse: Mapping[str, int]) -> None:
        """Gives the states what compensation adds to them, which is decided by values."""
        for name, parameter in self.model.named_parameters():
            if not coarse.get(name) or not parameter.requires_grad:
                continue
            state = self._optimizer.state[parameter]
            if self._masters is not None and parameter in self._masters.low:
                state["slots"] = torch.empty(-(-parameter.numel() // BLOCK), dtype=torch.int32)
                state["lowest"] = torch.empty(coarse[name], BLOCK, dtype=torch.int16)
            else:
                state["residual"] = torch.zeros_like(parameter)

    def _tell_kinds(self) -> None:
        states = [leaf for leaf in tree_leaves(list(self._optimizer.state.values())) if isinstance(leaf, Tensor)]
        self._live.add(states, STATES)
        self._live.add([parameter.grad for parameter in self._trained], GRADIENTS)
        halves = [] if self._masters is None else self._masters.low.values()
        self._live.add([*self.model.parameters(), *self.model.buffers(), *halves], WEIGHTS)

    def _measured(self, work: Callable[[], Any]) -> dict[str, int]:
        gc.collect()
        self._live.reset_peak()
        with self._inside():
            work()
        return {kind: self._live.peak.get(kind, 0) for kind in KINDS}

    @contextmanager
    def _inside(self) -> Iterator[None]:
        with values_refused(), self._mode, self._live:
            yield


def fake_model(config: Any) -> nn.Module:
    """A causal language model of fp32 parameters without values; to be called under a FakeTensorMode."""
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        model.tie_weights()
    except Exception as error:  # each model's code has its own ways to fail over a bad number
        raise Unplannable(
            f"this configuration makes no causal language model with torch's attention ({one_line(error)}): check it"
        ) from error
    return model


def add_fake_adapters(model: nn.Module, settings: TrainSettings) -> None:
    """Puts LoRA adapters without values on a model without values; to be called under a FakeTensorMode."""
    with unset_fake_temporarily():  # peft moves what it makes, which fake tensors don't stand
        add_adapters(model, settings)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, FakeTensor):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))


@contextmanager
def values_refused() -> Iterator[None]:
    """Turns a model's question for values, which fake tensors don't have, and all else that fails, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the model's code is anybody's, and so is what it raises for want of values
        raise Unplannable(
            f"this model's memory can't be planned, for its code doesn't run without values ({one_line(error)}): "
            "leave budget out"
        ) from error


def one_line(error: BaseException) -> str:
    """What an error is and says, within a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def full_packs(method: str, pack_tokens: int, longest: int, vocabulary: int) -> TokenSet:
    """A set whose rows fill packs: of at most `longest` tokens each, all but the first of them a completion.

    That takes more than rows of long prompts, where the head and the last MLP have less to do. KTO gets two rows at
    least, for a single one has no other to be paired with.
    """
    fitting = max(1, -(-pack_tokens // longest))
    inputs = pack_tokens // fitting if pack_tokens >= longest else longest - 1  # the last token is no input
    count = max(2, fitting) if method == "kto" else fitting
    prompts = [np.array([row % vocabulary], dtype=np.int32) for row in range(count)]
    completions = [np.zeros(inputs, dtype=np.int32) for _ in range(count)]
    labels = np.arange(count) % 2 == 0 if method == "kto" else None
    return TokenSet(prompts, completions, labels, 0)


def coarse_weights(
    parameters: Iterable[tuple[str, Tensor]], split: set[str], settings: TrainSettings, warmup_steps: int
) -> dict[str, int]:
    """How many blocks of each of these weights, by name, are compensated for steps too small for fp32.

    Args:
        split: names of those that the optimizer splits; another one counts as one block, and is compensated whole.
    """
    smallest = settings.learning_rate / max(1, warmup_steps)
    found = {}
    for name, weight in parameters:
        if name in split:
            found[name] = coarse_blocks(weight.float().view(-1), settings.learning_rate)
        else:
            found[name] = int(is_too_coarse(weight.float(), smallest))
    return found


def split_names(model: nn.Module, settings: TrainSettings) -> set[str]:
    """Names of the parameters of a model, whole or fake, that the optimizer of the settings splits."""
    if not settings.splits_weights:
        return set()
    taken = splittable(model)
    return {name for name, parameter in model.named_parameters() if parameter in taken}
