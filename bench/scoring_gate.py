"""When two sides have given the same answer; without that no ratio is printed.

In fp32 every sum of log-probabilities must agree. In low precision two right answers differ by rounding, so both are
held against a plain fp32 forward with the same weights: our error may not exceed the peer's by more than a little, and
the peer's must be rounding and not another answer.
"""

import numpy as np

RELATIVE, ABSOLUTE = 1e-4, 1e-3  # of a sum of log-probabilities in nats, in fp32
# What our error may exceed the peer's by in low precision, as a share of it and divided by the root of the number of
# replies: three standard errors of the ratio of two root mean squares.
MORE = 3.0
LITTLE = 1e-3  # nats a scored token, added to that
# bf16 has 8 bits, so a logit of about 10 is rounded by up to 0.03 nats; rounding adds up with the root of the number
# of tokens. Eight times that is still less than one token left out costs, the logarithm of the vocabulary.
ROUNDING = 0.25


def same_answer(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray, truth: np.ndarray | None = None) -> bool:
    """Whether two arrays of sums of log-probabilities, float [replies] in nats, answer one question alike.

    Args:
        tokens: how many tokens each of them sums over.
        truth: the sums by a plain fp32 forward, for low precision; None in fp32.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return False
    if truth is None:
        return bool((np.abs(ours - theirs) <= np.maximum(ABSOLUTE, RELATIVE * np.abs(theirs))).all())
    our_error, their_error = np.abs(ours - truth), np.abs(theirs - truth)
    little = LITTLE * float(np.sqrt((tokens**2).mean()))
    more = 1 + MORE / np.sqrt(len(tokens))
    within = _root_mean_square(our_error) <= more * _root_mean_square(their_error) + little
    return bool(within and (np.maximum(our_error, their_error) <= ROUNDING * np.sqrt(tokens)).all())


def _root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt((errors**2).mean()))
