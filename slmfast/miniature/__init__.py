"""The built-in tiny world: bilingual instructions whose right answers are known, and three models trained on it.

    lexicon.py      the words of the world in both languages
    skills.py       what can be asked: each skill draws an item with its right answer and its true label
    phrasings.py    how it can be asked, in English and in Chinese
    stories.py      the long contexts that some questions come with
    replies.py      is a reply right, and the wrong replies that raw data is full of
    raw_files.py    one record in each of the six seed formats
    malformed.py    records that no reader may accept
    world.py        write_world: the raw files, the evaluation items and the truth about every record
    truth.py        the truth read back
    tokenizer.py    one byte-level BPE for all models
    examples.py     what the models are trained on: tasks, labels and judgements
    training.py     training from scratch
    measure.py      held-out scores
    build.py        `python -m slmfast.miniature.build`: all of it again

Only the last four need torch or transformers.
"""

from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"  # large, base, small: complete model folders
TASKS = HERE / "tasks"  # lm-eval task files; ${DATA} stands for the folder of the evaluation items
MODEL_NAMES = ("large", "base", "small")
EVALUATION_TASKS = ("mini_arithmetic", "mini_code", "mini_compare", "mini_lexicon", "mini_text")
