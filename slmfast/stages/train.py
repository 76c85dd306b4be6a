"""Train: SFT (S1), KTO (S2), and SFT then KTO (S3) of the base model (the paper, section 4.2)."""

from slmfast.job import Counts, Job
from slmfast.recipe import TRAINED

INPUTS = ("align",)
MODELS = ("base",)

STARTS = {"S1": None, "S2": None, "S3": "S1"}  # the model each starts from; None is the base model


def run(job: Job) -> Counts:
    """Writes the folders S1, S2 and S3, each a complete model; one that is there already is finished."""
    # Only here: whoever merely asks what is up to date needs neither torch nor transformers.
    from slmfast.training.kto import train_kto
    from slmfast.training.sft import train_sft

    for name in TRAINED:
        output = job.folder / name
        if output.exists():
            continue
        start = job.model("base") if STARTS[name] is None else job.folder / STARTS[name]
        settings = getattr(job.settings, name)
        train, dataset = (train_sft, "sft") if settings.method == "sft" else (train_kto, "kto")
        print(f"train: {name} is {settings.method.upper()} from {STARTS[name] or 'base'}", flush=True)
        data = job.inputs["align"] / dataset
        threads = job.recipe.threads or 0
        train(start, data, output, settings, seed=job.recipe.seed, threads=threads, work=job.work / name)
    return Counts(None, len(TRAINED))
