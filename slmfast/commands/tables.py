"""What commands print of scores: aligned text, in percent with standard errors."""

from pathlib import Path
from typing import Any


def format_scores(scores: dict[str, dict[str, Any]]) -> str:
    """Scores in percent with standard errors, a row a task."""
    tasks = list(next(iter(scores.values())))
    lines = [f"{'task':<20}" + "".join(f"{model:>15}" for model in scores)]
    for task in tasks:
        cells = []
        for model in scores:
            score = scores[model][task]
            error = "" if score["stderr"] is None else f" ±{100 * score['stderr']:.1f}"
            cells.append(f"{100 * score['value']:.1f}{error}")
        lines.append(f"{task:<20}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def format_study(found: dict[str, Any]) -> str:
    """A study's means over seeds in points with their standard errors, a row a model, and its statements."""
    tasks = [*found["tasks"], "mean"]
    lines = [f"{'model':<14}" + "".join(f"{task:>17}" for task in tasks)]
    for model, means in found["means"].items():
        cells = []
        for task in tasks:
            error = means[task]["stderr"]
            cells.append(f"{100 * means[task]['value']:.1f}" + ("" if not error else f" ±{100 * error:.1f}"))
        lines.append(f"{model:<14}" + "".join(f"{cell:>17}" for cell in cells))
    for claim in found["claims"]:
        lines += ["", f"{claim['statement']}: {'yes' if claim['holds'] else 'no'}. {claim['words']}"]
    if found["better_rates"]:
        lines += ["", found["better_rates"]]
    return "\n".join(lines)


def format_search(found: dict[str, Any]) -> str:
    """A search's points, best first, in percent with standard errors, and the winner's lead."""
    names = [Path(model).name for model in found["models"]]
    lines = ["".join(f"{name:>12}" for name in names) + f"{'score':>15}"]
    for point in sorted(found["points"], key=lambda point: -point["value"]):
        error = "" if point["stderr"] is None else f" ±{100 * point['stderr']:.1f}"
        weights = "".join(f"{weight:>12g}" for weight in point["weights"])
        score = f"{100 * point['value']:.1f}{error}"
        lines.append(f"{weights}{score:>15}")
    winner = found["winner"]
    error = "" if winner["lead_stderr"] is None else f" ±{100 * winner['lead_stderr']:.1f}"
    lines.append(
        f"lead over the best single model, {Path(winner['best_single']).name}: {100 * winner['lead']:.1f}{error}"
    )
    return "\n".join(lines)
