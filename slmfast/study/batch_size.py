"""The batch that a loss expects (Kaplan et al. 2020, "Scaling Laws for Neural Language Models", arXiv 2001.08361).

Equation 1.4: B_crit(L) = B* / L^(1/alpha_B), in tokens, with B* about 2e8 and alpha_B about 0.21; L in nats a token. At
a batch of B_crit a training takes twice the fewest steps and twice the fewest tokens that reach a loss; a larger batch
wastes tokens, a smaller one steps.
"""

from typing import Any

B_STAR = 2e8  # tokens
ALPHA_B = 0.21


def critical_batch(loss: float) -> float:
    """Tokens in a batch at which time and work are in balance for a loss in nats a token."""
    if loss <= 0:
        raise ValueError(f"the loss is {loss}: the law holds for losses above 0")
    return B_STAR / loss ** (1 / ALPHA_B)


def expected_batch(log: list[dict[str, Any]]) -> dict[str, float] | None:
    """What the law expects of an SFT run from its log: losses, tokens of a step, and critical batches; None without."""
    rows = [row for row in log if row.get("loss", 0) > 0 and "tokens" in row]
    if not rows:
        return None
    last = rows[-max(1, len(rows) // 10) :]
    first_loss, last_loss = rows[0]["loss"], sum(row["loss"] for row in last) / len(last)
    return {
        "first_loss": first_loss,
        "last_loss": last_loss,
        "step_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "first_critical_tokens": critical_batch(first_loss),
        "last_critical_tokens": critical_batch(last_loss),
    }


def in_words(found: dict[str, float], samples: int) -> str:
    """The comparison and what it is worth."""
    first, last, step = (found[key] for key in ("first_critical_tokens", "last_critical_tokens", "step_tokens"))
    size = "above" if step > max(first, last) else "below" if step < min(first, last) else "between the two"
    verdict = {
        "above": "by this law steps of that size waste tokens",
        "below": "by this law no step is too large, and a larger batch would take fewer steps at little cost in tokens",
        "between the two": "by this law it is about right",
    }[size]
    return (
        "Batch size from expected loss (Kaplan et al. 2020, B_crit = 2e8 / L^(1/0.21) tokens): S1's loss goes from "
        f"{found['first_loss']:.3f} to {found['last_loss']:.3f} nats a token, for which {first:.2g} to {last:.2g} "
        f"tokens are critical. A step of S1 has {samples:,} samples, {step:,.0f} tokens with a loss, which is {size}: "
        f"{verdict}. What it is worth: an order of magnitude at best. The law was fitted to pre-training from scratch, "
        "on web text, with one tokenizer, at losses of 3 nats and more. Replies of a trained model lie below that, "
        "where the power of 4.8 blows up small differences of the loss, and fine-tuning at small rates has another "
        "noise of gradients. It speaks of tokens and steps to a loss, not of scores."
    )
