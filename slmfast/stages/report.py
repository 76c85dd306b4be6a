"""Report: the whole run on one page, as self-contained HTML and as Markdown."""

from slmfast.job import Counts, Job
from slmfast.recipe import STAGES, dump_recipe
from slmfast.store import MANIFEST, atomic_path, file_digest, read_json

INPUTS = STAGES[:-1]
MODELS: tuple[str, ...] = ()


def files(job: Job) -> list[str]:
    """The recipe and the digests of all manifests: the page shows settings and figures on which no data depend."""
    manifests = [folder / MANIFEST for folder in job.inputs.values()]
    return [dump_recipe(job.recipe), *(file_digest(path) for path in manifests if path.exists())]


def ended_stages(job: Job) -> dict[str, str | None]:
    """The digests of the stages that have ended and read what those before them hold now, by their manifests."""
    ended: dict[str, str | None] = {}
    for stage, folder in job.inputs.items():
        if (folder / MANIFEST).exists():
            manifest = read_json(folder / MANIFEST)
            if all(ended.get(earlier) == given for earlier, given in manifest.get("inputs", {}).items()):
                ended[stage] = manifest.get("digest")
    return ended


def run(job: Job) -> Counts:
    """Writes report.html and report.md, and notes the scoreboard where the run has a ground truth."""
    # Here and not above: the pipeline asks every stage for its inputs, and drawing takes a second to import.
    from slmfast.reporting.build import build_document
    from slmfast.reporting.html_page import render_html
    from slmfast.reporting.markdown_page import render_markdown
    from slmfast.reporting.run_folder import RunFolder
    from slmfast.reporting.scoreboard import measure

    # Of a stage that was cut off no table is shown: its folder is taken for one that isn't there.
    ended = ended_stages(job)
    ended = {stage: path if stage in ended else path / "unfinished" for stage, path in job.inputs.items()}
    folder = RunFolder(job.run_dir, job.recipe, ended)
    scoreboard = measure(folder) if folder.manifest("align") else None  # of less it would be a wrong one
    if scoreboard is not None:
        job.notes["scoreboard"] = scoreboard
    document = build_document(folder, scoreboard)
    pages = {"report.html": render_html(document), "report.md": render_markdown(document)}
    for name, text in pages.items():
        with atomic_path(job.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return Counts(None, len(pages))
