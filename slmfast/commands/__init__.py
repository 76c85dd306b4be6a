"""What each sub-command does. A handler takes the parsed arguments and returns an exit code, None for success."""

from slmfast.commands.data import collect, data_stage, dedup
from slmfast.commands.machine import bench, doctor
from slmfast.commands.models import evaluate, fuse, plan, train
from slmfast.commands.runs import MINIATURE, report, run, status, study

__all__ = [
    "MINIATURE",
    "bench",
    "collect",
    "data_stage",
    "dedup",
    "doctor",
    "evaluate",
    "fuse",
    "plan",
    "report",
    "run",
    "status",
    "study",
    "train",
]
