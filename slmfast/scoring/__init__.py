"""Scoring with a causal language model: perplexity of replies, log-probability of choices.

Both are the same computation: a prompt, shared by several continuations, and the log-probability of every token of
each. `encoding` makes token ids of text, `packing` lays them out in batches, `forward` runs the model, `head` turns
hidden states into log-probabilities.
"""

from slmfast.scoring.choices import choose
from slmfast.scoring.perplexity import perplexity

__all__ = ["choose", "perplexity"]
