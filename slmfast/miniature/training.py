"""Training from scratch: Qwen2-architecture models of a million weights on a laptop's processor.

Batches are drawn from the world as training goes, so no example comes twice except by chance. The loss stands on the
reply and its closing token; a right reply that a judging prompt quotes is learned as well, since judging a sum begins
with knowing it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen2Config, Qwen2ForCausalLM

from slmfast.miniature.examples import Diet, Example, draw_example
from slmfast.miniature.tokenizer import END, START, WINDOW

IGNORED = -100
_POOL = 16  # batches are cut from a sorted pool of this many, so that lengths within a batch are alike


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shape of a model and how long it is trained."""

    hidden: int
    layers: int
    heads: int
    diet: Diet
    steps: int
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05


def new_model(plan: Plan, vocabulary: int, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model with tied embeddings."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=plan.hidden,
        intermediate_size=plan.hidden * 3,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.heads,
        num_key_value_heads=plan.heads // 2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM._from_config(config, attn_implementation="eager")


def train(plan: Plan, tokenizer: Tokenizer, seed: int, say: Callable[[str], None]) -> Qwen2ForCausalLM:
    """A trained model in fp32 whose weights lie on the bf16 grid, since bf16 is what is saved."""
    model = new_model(plan, tokenizer.get_vocab_size(), seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, plan))
    backbone = torch.compile(model.model, dynamic=True)
    started, total = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(batches(plan, tokenizer, Random(seed)), start=1):
        loss = loss_on_labels(backbone, model.lm_head, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 100 == 0 or step == plan.steps:
            left = (time.monotonic() - started) / step * (plan.steps - step)
            say(f"step {step}/{plan.steps}  loss {total / (step % 100 or 100):.4f}  {left / 60:.1f} min left")
            total = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model.eval()


def _rate(step: int, plan: Plan) -> float:
    """Warm-up, a long plateau, and a straight line down to zero over the last two fifths."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return min(1.0, (plan.steps - step) / (0.4 * plan.steps))


def loss_on_labels(
    backbone: torch.nn.Module, head: torch.nn.Linear, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy over labelled positions; ids and labels are [rows, length], padded on the right.

    Causal attention never looks to the right, so the padding needs no mask; the head runs on labelled positions only.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORED
        logits = head(hidden[wanted])
    return functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def batches(plan: Plan, tokenizer: Tokenizer, rng: Random) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As many batches of (ids, labels) as the plan has steps."""
    made = 0
    while made < plan.steps:
        examples = [draw_example(plan.diet, rng) for _ in range(plan.batch * _POOL)]
        rows = sorted(encode(examples, tokenizer), key=lambda row: len(row[0]))
        cuts = [rows[i : i + plan.batch] for i in range(0, len(rows), plan.batch)]
        rng.shuffle(cuts)
        for cut in cuts[: plan.steps - made]:
            yield _padded(cut)
            made += 1


def encode(examples: list[Example], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each example; prompt and reply are tokenised separately and joined, as in scoring."""
    prompts = tokenizer.encode_batch_fast([chat_text(example.messages) for example in examples])
    completions = tokenizer.encode_batch_fast([f"{example.reply}{END}\n" for example in examples])
    rows = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        # The newline after the closing token is not worth a loss: it never varies.
        ids = prompt.ids + completion.ids[:-1]
        labels = [IGNORED] * len(prompt.ids) + completion.ids[:-1]
        if example.embedded:
            _label_quotation(example.embedded, prompt.ids, labels, tokenizer)
        rows.append((ids, labels))
    return rows


def chat_text(messages: list[dict[str, str]]) -> str:
    """The chat template with the generation prompt, written out: ten times as fast as the template engine."""
    turns = "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in messages)
    return f"{turns}{START}assistant\n"


def _label_quotation(text: str, ids: list[int], labels: list[int], tokenizer: Tokenizer) -> None:
    quoted = tokenizer.encode(f" {text}").ids
    if quoted[0] == tokenizer.token_to_id("Ġ"):
        quoted = quoted[1:]
    for start in range(len(ids) - len(quoted), 0, -1):
        if ids[start : start + len(quoted)] == quoted:
            labels[start : start + len(quoted)] = quoted
            return


def _padded(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids, _ in rows)
    pad = 0  # the id of PAD, the first special token
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORED] * (length - len(row)) for _, row in rows])
    return ids, labels
