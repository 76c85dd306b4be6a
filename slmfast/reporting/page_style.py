"""The page's style sheet: system fonts, light and dark by the reader's setting, one column that fits a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2127; --soft: #5b6470; --line: #d9dde3; --panel: #f5f6f8; --mark: #8a4b00;
  --mark-bg: #fff3dd;
  --c0: #6b7280; --c1: #1f6fb4; --c2: #c2570c; --c3: #1a8a5f; --c4: #a33e8f; --c5: #8a7300;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e4e7eb; --soft: #9aa4b1; --line: #343a43; --panel: #1d2127; --mark: #ffc46b;
    --mark-bg: #35280f;
    --c0: #a3acb8; --c1: #62aeea; --c2: #f2924a; --c3: #4fc794; --c4: #dc84ca; --c5: #d6bd45;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
    "Microsoft YaHei", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .6rem 0; max-width: 46rem; }
.subtitle, figcaption, caption, .rating { color: var(--soft); }
.note {
  margin: 1.2rem 0; padding: .8rem 1rem; border-left: 4px solid var(--mark); background: var(--mark-bg);
  color: var(--mark); font-weight: 600; font-size: 1.05rem;
}
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; margin: 1rem 0; list-style: none; }
a { color: var(--c1); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; font-size: .92rem; max-width: calc(100vw - 2rem); }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th, td { white-space: nowrap; }
th.words, td.words { text-align: left; padding-left: 0; }
td.words { white-space: normal; overflow-wrap: break-word; max-width: 30rem; }
td.words:first-child { min-width: 5rem; }
td.words + td.words + td.words { min-width: 14rem; }
figure { margin: 1.2rem 0; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { font-size: .92rem; }
article { margin: 1rem 0; padding: .9rem 1rem; background: var(--panel); border-radius: .4rem; }
pre {
  margin: .4rem 0; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  border: 1px solid var(--line); border-radius: .3rem; font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas,
    "Noto Sans Mono CJK SC", monospace;
}
article pre { background: var(--paper); }
.reply { margin-top: .7rem; font-size: .92rem; }
.fate { font-weight: 600; }
.fate.best { color: var(--c3); }
.fate.worst { color: var(--c2); }
summary { cursor: pointer; }
@media print { body { max-width: none; } nav { display: none; } }
""".strip()
