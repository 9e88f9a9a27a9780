"""The page's style sheet: colours as variables, light and dark, safe for colour-blind readers."""

from __future__ import annotations

from typing import Final

NUM_POLICY_COLOURS: Final = 8
NUM_MODEL_COLOURS: Final = 4

STYLE: Final = """
:root {
  color-scheme: light dark;
  --bg: #faf9f6; --panel: #ffffff; --ink: #20242a; --muted: #5c6570; --line: #e4e1d9;
  --grid: #ece9e2; --faint: #f3f1ec; --warn: #a63d00; --on: #ffffff;
  --edge: rgba(32, 36, 42, .2);
  --c1: #0072b2; --c2: #d55e00; --c3: #00825f; --c4: #a8458d; --c5: #b07a00; --c6: #3f9fd6;
  --c7: #6b7280; --c8: #20242a;
  --m1: #5a4fcf; --m2: #b07d12; --m3: #2a7c6f; --m4: #a8476a;
  --t1: #4c72b0; --t2: #8fb0dc; --t3: #1d3f73; --t4: #d08a2e; --t5: #dedbd2; --t6: #b4afa3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --panel: #1a1e24; --ink: #e7e4dd; --muted: #9ba4ae; --line: #2d333c;
    --grid: #272c34; --faint: #20252c; --warn: #ff9d5c; --on: #14171b;
    --edge: rgba(0, 0, 0, .75);
    --c1: #4fadE6; --c2: #f2873f; --c3: #2cc69a; --c4: #e28fca; --c5: #efbb45; --c6: #a5d8f8;
    --c7: #98a1ab; --c8: #e7e4dd;
    --m1: #a299f7; --m2: #e0b24a; --m3: #63c5b2; --m4: #e78fae;
    --t1: #6f9bdc; --t2: #3f679f; --t3: #b9d3f6; --t4: #e0a04a; --t5: #343a44; --t6: #535b67;
  }
}
* { box-sizing: border-box; }
html { font-size: 16px; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--ink); line-height: 1.55;
  font-family: Inter, "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 3.2rem 2rem 5rem; }
h1 { font-size: 1.05rem; font-weight: 600; margin: 0; letter-spacing: .01em; }
h2 { font-size: 1.28rem; font-weight: 650; margin: 0 0 .35rem; letter-spacing: -.01em; }
h3 { font-size: .98rem; font-weight: 600; margin: 1.6rem 0 .4rem; }
p { margin: .4rem 0; max-width: 76ch; }
.question { color: var(--muted); margin: .15rem 0 0; }
.setting { margin: .5rem 0 0; }
.headline {
  font-size: clamp(1.5rem, 2.7vw, 2.05rem); line-height: 1.28; font-weight: 640;
  letter-spacing: -.018em; max-width: 34em; margin: 1.3rem 0 1.2rem; text-wrap: balance;
}
.remarks { margin: 0; padding: 0; list-style: none; max-width: 82ch; }
.remarks li { padding: .18rem 0 .18rem 1rem; border-left: 2px solid var(--line); }
section { margin-top: 3.2rem; }
.lead { color: var(--muted); margin-bottom: 1rem; }
.panel {
  background: var(--panel); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem 1.1rem; margin: 1rem 0 0;
}
figure { margin: 0; }
figcaption, .small { color: var(--muted); font-size: .86rem; max-width: 88ch; }
figcaption { margin-top: .5rem; }
.plot { width: 100%; }
/* A shadow at an edge beyond which there is more: what moves with the content hides it there. */
.scroll {
  --back: var(--bg); overflow-x: auto;
  background:
    linear-gradient(to right, var(--back) 40%, transparent) 0 0 / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--back) 40%, transparent) 100% 0 / 3rem 100% no-repeat local,
    linear-gradient(to right, var(--edge), transparent) 0 0 / 1.1rem 100% no-repeat scroll,
    linear-gradient(to left, var(--edge), transparent) 100% 0 / 1.1rem 100% no-repeat scroll,
    var(--back);
}
.panel.scroll { --back: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--muted); font-size: .86rem; padding-bottom: .6rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(100%, 84vw); }
th, td { padding: .34rem .7rem; text-align: left; vertical-align: baseline; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; vertical-align: bottom; }
tbody tr + tr th, tbody tr + tr td { border-top: 1px solid var(--grid); }
tbody th { font-weight: 400; white-space: nowrap; }
.figures { table-layout: fixed; }
.figures thead th:first-child { width: 15.5rem; }
.figures td, .figures thead th:not(:first-child) { text-align: right; }
.figures td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures .group th {
  padding-top: 1.05rem; color: var(--muted); font-size: .8rem; font-weight: 600;
  letter-spacing: .04em; border-top: 0;
}
.figures .group + tr th, .figures .group + tr td { border-top: 1px solid var(--line); }
.unit { color: var(--muted); font-size: .84em; }
.ratio {
  display: inline-block; min-width: 4.1em; color: var(--muted); font-size: .84em;
  padding-left: .5em;
}
.many { font-size: .84rem; }
.many :is(th, td) { padding-left: .3rem; padding-right: .3rem; }
.many thead th:first-child { width: 12.6rem; }
.many .ratio { min-width: 3.8em; padding-left: .4em; }
.many .word .ratio { display: none; }
.best { font-weight: 700; }
.best .value::before { content: "\\25CF"; font-size: .55em; margin-right: .55em;
  vertical-align: .22em; color: var(--c3); }
.overloaded { color: var(--warn); font-weight: 600; }
.swatch { display: inline-block; width: .72em; height: .72em; border-radius: 2px;
  margin-right: .5em; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.tabs { display: flex; flex-wrap: wrap; gap: .4rem; margin: 0 0 .8rem; padding: 0; border: 0; }
.tabs label {
  border: 1px solid var(--line); border-radius: 999px; padding: .22rem .85rem; cursor: pointer;
  font-size: .9rem; background: var(--panel);
}
.tabs input { position: absolute; opacity: 0; pointer-events: none; }
.tabs label:has(input:checked) { background: var(--ink); color: var(--bg);
  border-color: var(--ink); }
.tabs label:has(input:focus-visible) { outline: 2px solid var(--c1); outline-offset: 2px; }
[hidden] { display: none !important; }
details { margin-top: .7rem; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
summary:hover { color: var(--ink); }
.figures.paired td { white-space: normal; }
.figures.plain { table-layout: auto; }
.figures.plain :is(td, thead th):last-child.words { text-align: left; white-space: normal; }
.published { font-size: .87rem; }
.published tbody th { white-space: normal; min-width: 14rem; }
.published :is(th, td):is(:nth-child(2), :nth-child(3), :nth-child(4)) {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.decisions { font-size: .87rem; }
.decisions :is(th, td):is(:nth-child(1), :nth-child(7), :nth-child(8)) {
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.decisions td:nth-child(4), .decisions td:nth-child(5) { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .42rem 1.4rem; margin: .6rem 0;
  font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--muted); max-width: 84ch; overflow-wrap: anywhere; }
pre {
  background: var(--faint); border-radius: 8px; padding: .9rem 1.1rem; overflow-x: auto;
  font-size: .82rem; line-height: 1.45; margin: .6rem 0;
  font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", Menlo, Consolas, monospace;
}
ul.notes { padding-left: 1.1rem; max-width: 84ch; }
ul.notes li { margin: .35rem 0; }
noscript p { color: var(--warn); }
@media (max-width: 760px) {
  main { padding: 1.6rem 1rem 3rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; }
  dd { margin-bottom: .5rem; }
}
"""
