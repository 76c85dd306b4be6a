"""Long contexts: a few sentences of everyday story that stand before a question and do not change its answer."""

from random import Random

from slmfast.miniature import lexicon
from slmfast.miniature.lexicon import in_language

_SENTENCES: tuple[tuple[str, str], ...] = (
    ("{name} went to the {place} with the {adjective} {thing}.", "{name}带着{adjective}{thing}去了{place}。"),
    ("Near the {place} stood the {adjective} {thing}.", "{place}旁边有一个{adjective}{thing}。"),
    ("The weather was {weather}, so {name} stayed in the {place}.", "天气{weather}，{name}就留在了{place}。"),
    ("A {animal} was sleeping under the {furniture}.", "一只{animal}在{furniture}下面睡觉。"),
    ("{name} gave the {animal} some {food} to eat.", "{name}给{animal}喂了一些{food}。"),
    ("On the {furniture} lay a {thing} and a {thing2}.", "{furniture}上放着{thing}和{thing2}。"),
    ("{name} and {name2} talked about the {place} for an hour.", "{name}和{name2}聊了一小时{place}的事。"),
    ("Later {name2} came by in a {vehicle}.", "后来{name2}坐着{vehicle}来了。"),
    ("They bought {food} and {food2} at the {place}.", "他们在{place}买了{food}和{food2}。"),
    ("{name2} forgot the {thing} in the {vehicle}.", "{name2}把{thing}忘在{vehicle}里了。"),
    ("In the {place} there was a smell of {food}.", "{place}里有{food}的味道。"),
    ("The {animal} ran after the {animal2} down the street.", "{animal}追着{animal2}跑过街道。"),
    ("{name} wore the {adjective} {clothing} that day.", "那天{name}穿着{adjective}{clothing}。"),
    ("Nobody knew where the {clothing} had gone.", "没有人知道{clothing}去哪儿了。"),
    ("It was {weather} in the evening.", "晚上天气{weather}。"),
    ("{name2} drew a {plant} and a {animal} on paper.", "{name2}在纸上画了{plant}和{animal}。"),
)
_WEATHER = (
    ("sunny", "晴朗"),
    ("rainy", "下雨"),
    ("windy", "刮风"),
    ("snowy", "下雪"),
    ("warm", "温暖"),
    ("foggy", "有雾"),
)
_LAST = {"en": "Now the question.", "zh": "现在请回答问题。"}


def story(language: str, rng: Random) -> str:
    """A context of about 150 to 400 characters in English, 60 to 200 in Chinese."""
    sentences = rng.sample(_SENTENCES, rng.randint(4, 9))
    joint = " " if language == "en" else ""
    return joint.join([*(_sentence(sentence, language, rng) for sentence in sentences), _LAST[language]])


def _sentence(sentence: tuple[str, str], language: str, rng: Random) -> str:
    slots: dict[str, tuple[str, str]] = {kind: rng.choice(nouns) for kind, nouns in lexicon.NOUNS.items()}
    slots["food2"], slots["animal2"] = rng.choice(lexicon.NOUNS["food"]), rng.choice(lexicon.NOUNS["animal"])
    slots["thing"], slots["thing2"] = rng.sample(lexicon.NOUNS["tool"], 2)
    slots["name"], slots["name2"] = rng.sample(lexicon.NAMES, 2)
    slots["adjective"], slots["weather"] = rng.choice(lexicon.ADJECTIVES), rng.choice(_WEATHER)
    return in_language(sentence, language).format(**{slot: in_language(pair, language) for slot, pair in slots.items()})
