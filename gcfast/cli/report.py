"""A run as one HTML page that needs no other file and no network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from gcfast.cli.plots import lambda_path, legend_colours, loss_curves, singular_values
from gcfast.cli.progress import format_seconds
from gcfast.storage.files import write_text


class Verdict(NamedTuple):
    """``level`` is good, partial or bad; the rest is for people."""

    level: str
    headline: str
    detail: str


def write_report(path: Path, values: Mapping[str, Any]) -> Path:
    return write_text(path, render(values))


def verdict(values: Mapping[str, Any]) -> Verdict:
    """What the run established, in plain words; never more than the certificate says."""
    status, n = values["certificate"]["status"], values["n"]
    loss, target = values["loss"], values["settings"]["target_gap"]
    gap = loss["gap"]
    if status != "holds":
        reason = values["certificate_details"].get("reason") or "There is no certificate."
        if gap is not None and gap <= target:
            # L* bounds every network from below, so a loss this close to it needs no further proof.
            return Verdict(
                "partial",
                f"The loss is within {gap:.1e} of the global minimum, though the condition "
                + ("fails" if status == "fails" else "is not proved"),
                f"{_sentence(reason)} The loss reached, {loss['final']:.3g}, was measured against"
                f" L* = {loss['infimum']:.3g}, which no network can beat on this data.",
            )
        reached = "" if gap is None else f" The loss reached is {gap:.1e} above L* = {loss['infimum']:.3g}."
        headline = (
            "The condition fails: no guarantee for these weights"
            if status == "fails"
            else "Not decided: the condition is neither proved nor disproved"
        )
        return Verdict("bad" if status == "fails" else "partial", headline, _sentence(reason) + reached)
    if gap is None:
        return Verdict(
            "partial",
            "The guarantee holds; phase two was not solved in this run",
            f"The features of all {n:,} samples have full rank, proved, so the head alone can reach the"
            " global"
            " minimum; the run did not get there.",
        )
    if gap > target:
        return Verdict(
            "partial",
            f"The guarantee holds; the loss is still {gap:.1e} above the global minimum",
            f"The target was {target:.0e}.",
        )
    return Verdict(
        "good",
        "Global minimum reached, with proof that nothing better exists",
        f"The training loss is {loss['final']:.1e}. On these {n:,} samples no network whatever can get below"
        f" L* = {loss['infimum']:.3g}, so at most {gap:.1e} is left to gain (target: {target:.0e})."
        + (_why(values)),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _why(values: Mapping[str, Any]) -> str:
    certificate, n = values["certificate"], values["n"]
    if certificate["route"] == "direct":
        return (
            f" The features of all {n:,} samples were proved linearly independent,"
            " so the last layer can fit any targets."
        )
    return (
        f" All {n:,} samples are distinct where the wide layer sees them, so for almost every setting of"
        " the hidden"
        " weights the last layer can fit any targets."
    )


def render(values: Mapping[str, Any]) -> str:
    """The page for the values of ``result.json``."""
    judged = verdict(values)
    title = f"{values['dataset']}, {values['model']['description']}"
    body = [
        f"<header><p class=kicker>gcfast train</p><h1>{escape(title)}</h1></header>",
        "<section class='verdict"
        f" {judged.level}'><h2>{escape(judged.headline)}</h2><p>{_prose(judged.detail)}</p></section>",
        _cards(values),
        _notes(values),
        _section("Training loss", _curves(values)),
        _section("Results", _table(values)),
        _section("The certificate", _certificate(values)),
        _section("From tau to the global minimum", _path(values)),
        _section("Settings", _settings(values)),
        _section("How to reproduce", _reproduce(values)),
    ]
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>gcfast: {escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _figure(plot: Callable[[Mapping[str, Any], bool], str], values: Mapping[str, Any], caption: str) -> str:
    wide, narrow = plot(values, False), plot(values, True)
    return (
        f"<figure><div class=wide>{wide}</div><div class=narrow>{narrow}</div>"
        f"<figcaption>{_prose(caption)}</figcaption></figure>"
    )


def _prose(text: str) -> str:
    """Escaped, with numbers such as 1.1e-07 kept on one line."""
    return re.sub(r"\b\d[\d.]*e[+-]?\d+", r"<span class=number>\g<0></span>", escape(text))


def _cards(values: Mapping[str, Any]) -> str:
    certificate, errors = values["certificate"], values["test_error"]
    rank, bound = certificate["rank_lower"], certificate["sigma_min_lower"]
    cards = [
        ("certificate", (certificate["status"] or "none").upper(), _route(certificate["route"])),
        ("proved rank", "–" if rank is None else f"{rank:,}", f"of n = {values['n']:,} samples"),
        ("smallest singular value", "–" if not bound else f"≥ {bound:.1e}", "needed: > 0"),
        (
            "optimality gap",
            _number(values["loss"]["gap"]),
            f"L − L*, target {values['settings']['target_gap']:.0e}",
        ),
        (
            "test error",
            _percent(errors["nearest"]),
            f"{values['settings']['base']} alone: {_percent(errors['base'])}",
        ),
    ]
    return (
        "<div class=cards>"
        + "".join(
            f"<div><p class=name>{escape(name)}</p><p class=value>{escape(value)}</p><p"
            f" class=under>{escape(under)}</p></div>"
            for name, value, under in cards
        )
        + "</div>"
    )


def _route(route: str | None) -> str:
    return {"direct": "proved on the features", "theorem": "by the theorem"}.get(route or "", "")


def _notes(values: Mapping[str, Any]) -> str:
    return "".join(f"<p class=note>{_prose(note)}</p>" for note in values["notes"])


def _curves(values: Mapping[str, Any]) -> str:
    if not any(values["curves"].values()):
        return ""
    base = values["settings"]["base"]
    steps = values["steps"]
    return _figure(
        loss_curves,
        values,
        f"Loss on all {values['n']:,} training samples. A({base}) trains every weight up to tau (step"
        f" {steps['switch']:,} of {steps['total']:,}), then only the last layer. The green line is the jump"
        " from the"
        " head at tau to the solved one, at the same hidden weights.",
    )


def _table(values: Mapping[str, Any]) -> str:
    base, seconds = values["settings"]["base"], values["seconds"]
    names = {
        "base": f"{base} alone",
        "two_phase": f"A({base}), the paper's phase two",
        "nearest": f"A({base}), phase two solved (nearest)",
    }
    spent = {
        "base": _sum(seconds["base"]),
        "two_phase": _sum(seconds["phase_one"], seconds["phase_two"]),
        "nearest": _sum(seconds["phase_one"], seconds["solve"]),
    }
    rows = []
    for key, colour in legend_colours():
        rows.append(
            (
                f"<span class=dot style='background:{colour}'></span>{escape(names[key])}",
                _number(values["final_loss"][key]),
                _percent(values["test_error"][key]),
                _time(spent[key]),
            )
        )
    stages = (
        f"Phase one {_time(seconds['phase_one'])}, certificate {_time(seconds['certify'])}, solving phase two"
        f" {_time(seconds['solve'])}. Test error on {values['n_test']:,} samples the training never saw. A"
        " global minimum"
        " of the training loss promises nothing about test error; this table shows what it is."
        + _cached(values["cache"])
    )
    return (
        _html_table(("", "training loss", "test error", "training time"), rows, "figures")
        + f"<p class=small>{escape(stages)}</p>"
    )


def _cached(cache: Mapping[str, Any] | None) -> str:
    if cache is None:
        return ""
    what = "enters the wide layer" if cache["stored"] == "below" else "enters the head"
    return (
        f" The paper's phase two ran from a cache: the {cache['width']:,} numbers a sample that {what} were"
        f" computed once, in {_time(cache['seconds'])}, and hold {cache['bytes'] / 2**20:,.1f} MiB."
    )


def _certificate(values: Mapping[str, Any]) -> str:
    found = values["certificate"]
    details = values["certificate_details"]
    n, width = values["n"], values["width"]
    if found["status"] is None:
        return "<p>There is none: the run did not get to it, or it was refused; see the notes.</p>"
    parts = []
    if found["status"] == "holds" and found["route"] == "direct":
        parts.append(
            f"<p>Write H for the {n:,} × {width + 1:,} matrix of last-hidden-layer outputs on the training"
            " set, with a"
            f" column of ones, at the weights frozen at tau. Its rank is {n:,}: proved for the matrix as"
            " stored, rounding"
            " errors included, and so is the bound on its smallest singular value. Full row rank means the"
            " last layer can"
            " produce any outputs on the training set; hence the convex problem that phase two solves has"
            " the minimum L*,"
            " which no network can beat.</p>"
        )
    elif found["status"] == "holds":
        parts.append(
            "<p>The condition holds by theorem: the assumptions below were checked on this network and this"
            " data. For"
            " almost every setting of the hidden weights the last layer can produce any outputs on the"
            " training set, and"
            " the Gaussian step at tau lands on such a setting with probability one.</p>"
        )
    else:
        parts.append(f"<p>{_prose(_sentence(str(details.get('reason', ''))))}</p>")
    assumptions = details.get("assumptions") or []
    if assumptions:
        parts.append(
            "<ul class=assumptions>" + "".join(_assumption(entry) for entry in assumptions) + "</ul>"
        )
    if found["offenders"]:
        items = "".join(
            f"<li>{escape(_offender(entry))}</li>" for entry in found["offenders"][:_MOST_OFFENDERS]
        )
        more = len(found["offenders"]) - _MOST_OFFENDERS
        parts.append(
            f"<p>Offenders{f' (the first {_MOST_OFFENDERS}, and {more} more)' if more > 0 else ''}:</p>"
        )
        parts.append(f"<ul>{items}</ul>")
    if values["spectrum"]:
        caption = "Singular values of H, by an ordinary float64 computation, for orientation."
        if found["sigma_min_lower"]:
            caption += (
                " Only the green line is proved: it needs to be above zero, and is. Rank by tolerance in"
                " float32 misses"
                " every value below the dotted line."
            )
        parts.append(_figure(singular_values, values, caption))
    text = details.get("text")
    if text:
        parts.append(
            f"<details><summary>The certificate's own text</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)


_MOST_OFFENDERS = 10


def _offender(entry: Mapping[str, Any]) -> str:
    text = f"{entry['kind']}: samples {', '.join(str(index) for index in entry['samples'])}"
    if entry.get("targets") and entry.get("conflicting") is not None:
        agree = "conflicting" if entry["conflicting"] else "equal"
        text += f", {agree} targets {', '.join(str(target) for target in entry['targets'])}"
    return text


def _assumption(entry: Mapping[str, Any]) -> str:
    status = str(entry["status"])
    kind = {"holds": "yes", "fails": "no"}.get(status, "open")
    return (
        f"<li class={kind}><b>{escape(str(entry['name']))}</b> <span class=status>{escape(status)}</span>"
        f"<br>{_prose(str(entry['reason']))}</li>"
    )


def _path(values: Mapping[str, Any]) -> str:
    points = [pair for pair in values["path"] if pair[0] > 0 and pair[1] > 0]
    if not points:
        return ""
    solver = values["solver"]
    return _figure(
        lambda_path,
        values,
        "Phase two has many minimisers. gcfast follows the path that starts at the head of tau and changes"
        " it as little"
        f" as each loss allows, and stops at the target: {len(points)} values of λ,"
        f" {solver.get('iterations')} Newton"
        f" steps, {_time(values['seconds']['solve'])}.",
    )


def _settings(values: Mapping[str, Any]) -> str:
    settings, data, model = values["settings"], values["data"], values["model"]
    rows = [
        ("data", f"{data['source']}; {values['n']:,} training, {values['n_test']:,} test samples"),
        ("inputs", f"{' × '.join(str(extent) for extent in data['shape'])}; {data['normalisation']}"),
        ("model", f"{model['description']}, {model['activation']}"),
        ("loss", settings["loss"]),
        ("base optimizer", _optimizer(settings)),
        (
            "steps",
            f"{values['steps']['total']:,} in {settings['epochs']} epochs of batch {settings['batch_size']}",
        ),
        ("tau", f"{settings['tau']:g} of all steps; Gaussian step of size {settings['perturbation']:g}"),
        ("target gap", f"{settings['target_gap']:g}"),
        ("seed", str(settings["seed"])),
        ("device", settings["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["versions"].items())),
    ]
    return _html_table((), [(escape(name), escape(str(value))) for name, value in rows], "settings")


def _optimizer(settings: Mapping[str, Any]) -> str:
    momentum = f", momentum {settings['momentum']:g}" if settings["base"] in ("sgd", "rmsprop") else ""
    return f"{settings['base']}, learning rate {settings['lr']:g}{momentum}"


def _reproduce(values: Mapping[str, Any]) -> str:
    return (
        f"<pre>{escape(values['command'])}</pre>"
        "<p class=small>Same seed, same versions and same number of threads give the same run. The figures"
        " of this page"
        " are in result.json, the weights in checkpoint.pt, both beside it. Method: Kawaguchi and Sun, A"
        " Recipe for"
        " Global Convergence Guarantee in Deep Neural Networks, AAAI 2021 (arXiv 2104.05785).</p>"
    )


def _html_table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table class={kind}>{top}{lines}</table></div>"


def _sum(*seconds: float | None) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else format_seconds(seconds)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"


_STYLE = """
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
