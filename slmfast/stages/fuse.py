"""Fuse: a weighted average of the trained models' weights (the paper, section 4.5)."""

from slmfast.fusion import fuse
from slmfast.job import Counts, Job

INPUTS = ("train",)
MODELS = ("base",)


def run(job: Job) -> Counts:
    """Writes the folder `fused`, a complete model."""
    weights = {
        job.model("base") if name == "base" else str(job.inputs["train"] / name): weight
        for name, weight in job.settings.weights.items()
        if weight > 0
    }
    # A published base is stored in bf16, what it was trained to in fp32.
    mixed = job.settings.weights.get("base", 0) > 0
    fuse(weights, job.folder / "fused", mixed_dtypes=mixed)
    return Counts(None, 1)
