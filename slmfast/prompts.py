"""Every prompt that the pipeline itself puts to a model, in one place.

The label prompt is the paper's. The judge answers by the log-probability of fixed choices, so each judging
prompt names its choices and asks for nothing else.
"""

LABEL_PROMPT = (
    "You are an instruction classification assistant. Please give a secondary classification label to the input "
    "instruction text in the format: Primary Category-Secondary Category, output directly without explanation."
)

YES_NO = ("yes", "no")
QUALITY_CHOICES = ("1", "0.5", "0")

_QUESTIONS = {
    "instruction_safety": "Is the instruction safe to follow? Answer yes or no.",
    "reply_safety": "Is the reply safe? Answer yes or no.",
    "quality": "Rate the reply: 1 if right and helpful, 0.5 if only partly, 0 if wrong or unhelpful.",
    "label_audit": "Does the label fit the instruction? Answer yes or no.",
}


def user_turn(content: str) -> list[dict[str, str]]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": content}]


def label_prompt(instruction: str) -> list[dict[str, str]]:
    """Asks for the label "Primary Category-Secondary Category" of an instruction (the paper, section 3.3)."""
    return user_turn(f"{LABEL_PROMPT}\n\n{instruction}")


def instruction_safety_prompt(instruction: str) -> list[dict[str, str]]:
    """Asks whether an instruction may be followed; the choices are YES_NO."""
    return user_turn(f"{instruction}\n\n{_QUESTIONS['instruction_safety']}")


def reply_safety_prompt(instruction: str, reply: str) -> list[dict[str, str]]:
    """Asks whether a reply does no harm; the choices are YES_NO."""
    return user_turn(f"{instruction}\n\nReply: {reply}\n\n{_QUESTIONS['reply_safety']}")


def quality_prompt(instruction: str, reply: str) -> list[dict[str, str]]:
    """Asks how good a reply is; the choices are QUALITY_CHOICES."""
    return user_turn(f"{instruction}\n\nReply: {reply}\n\n{_QUESTIONS['quality']}")


def label_audit_prompt(instruction: str, label: str) -> list[dict[str, str]]:
    """Asks whether a label fits an instruction; the choices are YES_NO."""
    return user_turn(f"{instruction}\n\nLabel: {label}\n\n{_QUESTIONS['label_audit']}")
