"""The report: what a run did and what came of it, as one self-contained HTML page and as Markdown.

run_folder.py           what the finished stages left behind, read leniently
document.py             sections made of texts, tables, plots and examples, and how figures are written
data_section.py         the stages' balance, where rows went, shares by source, language and category
label_section.py        labels: balance, tree, audit, agreement with the rule categories
reply_section.py        ratings by origin, the sets, examples to read
distributions.py        how perplexities and ratings spread, and who wins in which language
contamination_section.py   records that hold items of the benchmarks
training_section.py     loss curves, rewards, fusion weights
score_section.py        scores with standard errors, differences to the base model
scoreboard.py           the stages measured against the miniature's ground truth
scoreboard_section.py   the same as tables
provenance_section.py   deviations, settings, environment, how to do it again
plots.py                matplotlib drawings as inline SVG that follows the page's colours
html_page.py, page_style.py, markdown_page.py   a document as text
data_card.py            what the final sets are made of, as Markdown beside them
model_card.py           what a trained or fused model is, as README.md in its folder
build.py                all sections of a run as one document
"""
