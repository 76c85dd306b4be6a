"""All sections of a run as one document."""

from slmfast.reporting import data_section, score_section
from slmfast.reporting.category_section import categories_section
from slmfast.reporting.contamination_section import contamination_section
from slmfast.reporting.data_section import mixture_section, stages_section
from slmfast.reporting.document import Document, Section, Table
from slmfast.reporting.label_section import labels_section
from slmfast.reporting.provenance_section import method_section, provenance_section
from slmfast.reporting.reply_section import examples_section, ratings_section, sets_section
from slmfast.reporting.run_folder import RunFolder
from slmfast.reporting.score_section import scores_section
from slmfast.reporting.scoreboard import Figures
from slmfast.reporting.scoreboard_section import scoreboard_section
from slmfast.reporting.training_section import fusion_section, training_section


def build_document(run: RunFolder, scoreboard: Figures | None) -> Document:
    """The report of a run; a part that the run hasn't got is left out."""
    recipe = run.recipe
    sections: list[Section | None] = [
        Section("In short", [Table("From raw records to trained models", ["", "figure"], _summary(run))]),
        scores_section(run),
        stages_section(run),
        None if scoreboard is None else scoreboard_section(scoreboard),
        mixture_section(run),
        categories_section(run),
        labels_section(run),
        ratings_section(run),
        sets_section(run),
        contamination_section(run),
        examples_section(run),
        training_section(run),
        fusion_section(run),
        method_section(run),
        provenance_section(run),
    ]
    return Document(
        title=recipe.report.title,
        subtitle=f"Run {recipe.name}, seed {recipe.seed}, written by slmfast's stage report.",
        note=recipe.report.note,
        sections=[section for section in sections if section is not None],
    )


def _summary(run: RunFolder) -> list[list[str]]:
    return [*data_section.summary_rows(run), *score_section.summary_rows(run)]
