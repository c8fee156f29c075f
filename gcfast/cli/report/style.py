"""The style sheet of the HTML report."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5c6470; --page: #fff; --box: #f4f5f7;
  --grid: #d5d9df; --good: #1f7d54; --goodbox: #e7f5ee; --partial: #8a5a00; --partialbox: #fdf3df;
  --bad: #b3261e; --badbox: #fdeceb }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb6; --page: #15181d;
  --box: #1f242b;
  --grid: #39414b; --good: #5fd3a0; --goodbox: #15302a; --partial: #efc067; --partialbox: #352a12;
  --bad: #ff9a92; --badbox: #3a1a18 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 860px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 1.5rem; margin: 0 0 18px; line-height: 1.25 }
h2 { font-size: 1.12rem; margin: 36px 0 10px }
.kicker { margin: 0; color: var(--soft); font-size: .85rem }
.verdict { border-left: 5px solid; padding: 14px 18px; border-radius: 6px }
.verdict h2 { margin: 0 0 4px; font-size: 1.25rem }
.verdict p { margin: 0; color: var(--ink) }
.good { background: var(--goodbox); color: var(--good) }
.partial { background: var(--partialbox); color: var(--partial) }
.bad { background: var(--badbox); color: var(--bad) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(145px, 1fr)); gap: 10px;
  margin: 14px 0 0 }
.cards div { background: var(--box); border-radius: 6px; padding: 10px 12px }
.cards p { margin: 0 }
.name, .under { color: var(--soft); font-size: .8rem }
.value { font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap }
.note { background: var(--partialbox); border-radius: 6px; padding: 10px 14px; margin: 12px 0 0 }
figure { margin: 0 } figure svg { width: 100%; height: auto; display: block }
.narrow { display: none } .number { white-space: nowrap }
figcaption, .small { color: var(--soft); font-size: .88rem; margin: 6px 0 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th { text-align: right; font-weight: 600; color: var(--soft); font-size: .85rem }
th, td { padding: 7px 8px; border-bottom: 1px solid var(--grid); vertical-align: top }
.figures td:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.settings td:first-child { color: var(--soft); white-space: nowrap; width: 1% }
.settings td { overflow-wrap: anywhere }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
.assumptions { list-style: none; padding: 0; margin: 12px 0 }
.assumptions li { padding: 8px 0 8px 30px; border-bottom: 1px solid var(--grid); position: relative;
  overflow-wrap: anywhere }
.assumptions li::before { position: absolute; left: 4px; font-weight: 700 }
.yes::before { content: '✓'; color: var(--good) } .no::before { content: '✗'; color: var(--bad) }
.open::before { content: '?'; color: var(--partial) }
.status { color: var(--soft); font-size: .85rem; margin-left: .4em }
pre { background: var(--box); border-radius: 6px; padding: 12px 14px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft); margin-top: 10px }
@media (max-width: 520px) { main { padding: 18px 14px 40px } .cards { grid-template-columns: 1fr 1fr }
  .wide { display: none } .narrow { display: block } }
"""
