"""The sections of a recipe, one a stage under the stage's name: what each may say, and what it says by default."""

import math
import re
from dataclasses import dataclass, field

from slmfast.engines.settings import ENGINES
from slmfast.errors import UserError
from slmfast.recipe_values import require
from slmfast.training.settings import TrainSettings

TRAINED = ("S1", "S2", "S3")
CONTAMINATION = ("report", "remove", "skip")
# Benchmarks of a suite and their numbers of worked examples; slmfast.evaluation.suite says where these are from.
SUITES = {"paper": {"mmlu": 5, "cmmlu": 5, "ceval-valid": 5, "humaneval": 0, "gsm8k": 4}}
SUITE_NAMES = {"ceval": "ceval-valid"}  # what people call a benchmark, and lm-eval's name of it
CODE_TASKS = ("humaneval", "mbpp")  # how the names of tasks begin that run what a model wrote
EVALUATION_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class World:
    """The built-in miniature world: raw files that the run writes for itself."""

    size: int = 6000  # raw records
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.size >= 100, "world.size", "give at least 100 records")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Who answers, who judges and who is trained: folders, hub names, or builtin:large, builtin:small, builtin:base."""

    base: str = "builtin:base"  # the model to be trained
    large: str = "builtin:large"  # writes the large replies and the labels
    small: str = "builtin:small"  # writes the small replies
    judge: str | None = None  # rates replies; the large model unless named
    engine: str = "local"  # who runs them where `engines` says nothing else: local, vllm, or openai (a server)

    def __post_init__(self) -> None:
        require(self.engine in ENGINES, "models.engine", f"use {' or '.join(ENGINES)}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of raw records."""

    name: str
    format: str  # a name that slmfast.readers knows
    path: str | list[str]  # files or globs; of a dataset on the hub, those in its repository
    hub: str | None = None  # the dataset, owner/name@commit: the same files every time
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.hub is not None and re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", self.hub) is None:
            remedy = "give owner/name@commit, with the 40 digits of the commit that its page on the hub shows"
            raise UserError(f"hub {self.hub!r}: {remedy}")  # the recipe names the section


@dataclass(frozen=True, kw_only=True)
class Collect:
    sources: list[Source] = field(default_factory=list)  # in order of priority: of two duplicates the earlier stays
    max_text_bytes: int = 1 << 20  # a longer prompt or reply is rejected

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "collect.sources", "give every source a name of its own")
        require(self.max_text_bytes > 0, "collect.max_text_bytes", "give a positive number of bytes")


@dataclass(frozen=True, kw_only=True)
class Categorize:
    rules: str | None = None  # a YAML of rules; the built-in one unless named


@dataclass(frozen=True, kw_only=True)
class Dedup:
    k: int = 3  # the largest Hamming distance of two duplicates
    mode: str = "representative"  # or components: chains merge
    verify: float | None = 0.8  # least Jaccard similarity of the 3-grams; null: plain SimHash
    ngram: int = 3

    def __post_init__(self) -> None:
        require(1 <= self.ngram <= 9, "dedup.ngram", "give 1 to 9 characters")
        require(0 <= self.k <= 8, "dedup.k", "give a distance from 0 to 8")
        require(self.mode in ("representative", "components"), "dedup.mode", "use representative or components")
        require(self.verify is None or 0 <= self.verify <= 1, "dedup.verify", "give a share from 0 to 1, or null")


@dataclass(frozen=True, kw_only=True)
class Classify:
    sample: int | None = None  # label only so many records, chosen by a seeded hash; all of them unless given
    max_new_tokens: int = 32
    unit_rows: int = 1024  # rows that are labelled, written and, after a break, redone together

    def __post_init__(self) -> None:
        require(self.sample is None or self.sample > 0, "classify.sample", "give a positive number, or null for all")
        require(self.max_new_tokens > 0, "classify.max_new_tokens", "give a positive number")
        require(self.unit_rows > 0, "classify.unit_rows", "give a positive number")


@dataclass(frozen=True, kw_only=True)
class Diversify:
    target: int = 500_000  # records to keep
    selection: str = "exact"  # so many, as even as can be; or random: each by itself, so many on average
    min_label_count: int = 10  # labels with fewer records go
    audit: int | None = None  # records of each label that the judge is asked about; no audit unless given
    audit_threshold: float = 0.5  # a label goes where the judge finds a smaller share of them right

    def __post_init__(self) -> None:
        require(self.target > 0, "diversify.target", "give a positive number")
        require(self.selection in ("exact", "random"), "diversify.selection", "use exact or random")
        require(self.min_label_count >= 0, "diversify.min_label_count", "give zero or more")
        require(self.audit is None or self.audit > 0, "diversify.audit", "give a positive number, or null for no audit")
        require(0 <= self.audit_threshold <= 1, "diversify.audit_threshold", "give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Regenerate:
    max_new_tokens: int = 1024
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    unit_rows: int = 512

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "regenerate.max_new_tokens", "give a positive number")
        require(0 <= self.temperature < math.inf, "regenerate.temperature", "give zero (greedy) or more")
        require(0 < self.top_p <= 1, "regenerate.top_p", "give a share above 0, at most 1")
        require(self.unit_rows > 0, "regenerate.unit_rows", "give a positive number")


@dataclass(frozen=True, kw_only=True)
class Rate:
    unit_rows: int = 512
    token_budget: int | None = None  # tokens scored together; what the memory holds at the first run unless given

    def __post_init__(self) -> None:
        require(self.unit_rows > 0, "rate.unit_rows", "give a positive number")
        require(
            self.token_budget is None or self.token_budget > 0, "rate.token_budget", "give a positive number of tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Align:
    sft_size: int = 100_000  # SFT rows at most, water-filled over the labels
    positives_per_negative: float = 2.0
    max_reply_tokens: int | None = None  # a longer reply never wins
    outlier_fences: float = 3.0  # a reply that many quartile ranges above the third quartile of bits a token never wins
    benchmarks: dict[str, str | list[str]] = field(default_factory=dict)  # files or globs of each one's items, by name
    contamination: str = "report"  # records that hold items of the benchmarks: report, remove, or skip the check

    def __post_init__(self) -> None:
        require(self.sft_size > 0, "align.sft_size", "give a positive number")
        require(0 < self.positives_per_negative < math.inf, "align.positives_per_negative", "give a positive number")
        limit = self.max_reply_tokens
        require(limit is None or limit > 0, "align.max_reply_tokens", "give a positive number, or null for no limit")
        require(self.outlier_fences > 0, "align.outlier_fences", "give a positive number")
        require(self.contamination in CONTAMINATION, "align.contamination", f"use {', '.join(CONTAMINATION)}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The three trainings of the study. S1 is SFT, S2 is KTO, S3 is KTO from S1."""

    S1: TrainSettings = field(default_factory=lambda: TrainSettings(method="sft", learning_rate=5e-8))
    S2: TrainSettings = field(default_factory=lambda: TrainSettings(method="kto", learning_rate=1e-8))
    S3: TrainSettings = field(default_factory=lambda: TrainSettings(method="kto", learning_rate=3e-8))

    def __post_init__(self) -> None:
        methods = (self.S1.method, self.S2.method, self.S3.method)
        require(methods == ("sft", "kto", "kto"), "train", "S1 is method sft, S2 and S3 are method kto")


@dataclass(frozen=True, kw_only=True)
class Fuse:
    weights: dict[str, float] = field(default_factory=lambda: {"S1": 1.0, "S2": 1.0, "S3": 1.0})

    def __post_init__(self) -> None:
        known = set(self.weights) <= {"base", *TRAINED}
        require(known and bool(self.weights), "fuse.weights", "weigh base, S1, S2 and S3 and nothing else")
        positive = all(0 <= weight < math.inf for weight in self.weights.values()) and sum(self.weights.values()) > 0
        require(positive, "fuse.weights", "give weights of zero or more, one of them positive")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    suite: str | None = None  # paper: the paper's five benchmarks with pinned settings
    tasks: list[str] = field(
        default_factory=list
    )  # names that lm-eval knows, or files of `task_folder`; of a suite, all
    task_folder: str | None = None  # lm-eval task files of our own; builtin:miniature for the miniature's
    data: str | None = None  # what ${DATA} in those files stands for; of a suite, the folder of its files, else the hub
    limit: int | None = None  # items a task
    batch_size: int = 64  # replies written side by side
    chat_template: bool | None = None  # put each question as a user turn; without a suite yes, a suite's are bare text
    dtype: str = "float32"  # of the weights
    run_generated_code: bool = False  # humaneval runs what the models write, in a sandbox, and only if this is true

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, "evaluate.limit", "give a positive number, or null for all")
        require(self.batch_size > 0, "evaluate.batch_size", "give a positive number")
        require(
            self.suite is None or self.suite in SUITES, "evaluate.suite", f"use {', '.join(SUITES)}, or leave it out"
        )
        require(self.dtype in EVALUATION_DTYPES, "evaluate.dtype", f"use {', '.join(EVALUATION_DTYPES)}")
        code = [task for task in self.names if task.startswith(CODE_TASKS)]
        require(
            self.run_generated_code or not code,
            "evaluate.run_generated_code",
            f"{', '.join(code)} runs programs that the model writes; set it to true (or give --run-generated-code) to "
            "have them run in a sandbox, or leave it out of the tasks",
        )

    @property
    def names(self) -> list[str]:
        """The tasks, each once; those of the suite where none are named."""
        if self.suite is None:
            return list(dict.fromkeys(self.tasks))
        return list(dict.fromkeys(SUITE_NAMES.get(task, task) for task in self.tasks)) or list(SUITES[self.suite])

    @property
    def templated(self) -> bool:
        """Whether questions are put as user turns."""
        return self.suite is None if self.chat_template is None else self.chat_template


@dataclass(frozen=True, kw_only=True)
class Report:
    title: str = "Post-training report"
    note: str | None = None  # a sentence that stands above all figures
