"""Prompts by number, and what openai_server.py replies to them."""

PROMPTS = [f"prompt number {n}" for n in range(200)]


def texts(generations):
    """The replies alone."""
    return [generation.text for generation in generations]


def expected(prompts):
    """The replies that the server gives."""
    return [f"reply to {prompt}" for prompt in prompts]
