"""One tokenizer for all models of the miniature: byte-level BPE, trained on the world's own text.

Any text in NFC round-trips. Digits and capital letters inside codes stand alone, so that arithmetic and spelling work
on symbols; every Chinese character of the world is one token. The fixed prompts of the pipeline (labelling and judging)
are one token each: models of a million weights spend their width on what is asked, and not on reading the question.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from slmfast import prompts
from slmfast.miniature import lexicon, replies
from slmfast.miniature.phrasings import OPENINGS, PHRASINGS
from slmfast.miniature.skills import ADVICE, LABELS, REFUSALS, SKILLS, draw_item
from slmfast.miniature.stories import story

VOCABULARY = 1792
WINDOW = 1024
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What merges are learned within: a word with its space, or any single character. Digits, the capitals of codes and
# Chinese characters are such single characters, and so never merge with one another.
_PIECE = r" ?[A-Z]?[a-z]+| ?[^\sA-Za-z0-9\p{Han}]|[\s\S]"


def fixed_prompts() -> list[str]:
    """The sentences of slmfast.prompts that stand in every labelling or judging prompt."""
    label = prompts.label_prompt("")[0]["content"]
    judging = (
        prompts.instruction_safety_prompt(""),
        prompts.reply_safety_prompt("", ""),
        prompts.quality_prompt("", ""),
        prompts.label_audit_prompt("", ""),
    )
    return [label.partition("\n\n")[0], *(messages[0]["content"].rpartition("\n\n")[2] for messages in judging)]


def train_tokenizer(seed: int = 0, items: int = 30_000) -> Tokenizer:
    """A tokenizer with VOCABULARY tokens, the same for the same seed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split_by(_PIECE)
    tokenizer.decoder = decoders.ByteLevel()
    fixed = [AddedToken(text, normalized=False, special=False) for text in fixed_prompts()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(fixed),
        min_frequency=2,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed, items), trainer)
    tokenizer.add_tokens(fixed)
    # Beside a Qwen2 configuration AutoTokenizer builds Qwen2's own tokenizer, whatever tokenizer.json says of these.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split_by(PRETOKENIZE_REGEX)
    return tokenizer


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _corpus(seed: int, items: int) -> Iterator[str]:
    """World text; whatever the world says at all comes often enough that its words and characters earn a token."""
    rng = Random(seed)
    for text in _everything_said():
        yield from [text] * 60
    for _ in range(items):
        language = rng.choice(lexicon.LANGUAGES)
        item = draw_item(rng.choice(list(SKILLS)), language, rng, opening=0.3)
        yield f"{START}user\n{item.question}\n\nReply: {item.answer}{END}\n{START}assistant\n{item.answer}{END}\n"
        if rng.random() < 0.2:
            yield story(language, rng)


def _everything_said() -> Iterator[str]:
    """Each word, phrasing, label and stock reply of the world once."""
    for english, chinese in (
        *lexicon.all_nouns(),
        *lexicon.ADJECTIVES,
        *lexicon.NAMES,
        *lexicon.DAYS,
        *lexicon.PLANETS,
    ):
        yield f"{english} {english} a {english}s.{chinese}"
    for english, chinese in lexicon.CLASSES.items():
        yield f"{english} {english}{chinese}"
    for label in LABELS:
        yield f"Label: {label}"
    for skill in PHRASINGS.values():
        for templates in skill.values():
            yield from templates
    for forms in (replies.UNHELPFUL, replies.COMPLIANCE, REFUSALS, OPENINGS):
        for texts in forms.values():
            yield from texts
    yield from (text for pair in ADVICE.items() for half in pair for text in half)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, as AutoTokenizer loads them."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
