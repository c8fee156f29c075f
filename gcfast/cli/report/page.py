"""A run as one HTML page that needs no other file and no network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gcfast.cli.progress import format_seconds
from gcfast.cli.report.pictures import lambda_path, legend_colours, loss_curves, singular_values
from gcfast.cli.report.style import STYLE
from gcfast.cli.report.verdicts import sentence, verdict
from gcfast.storage import write_text


def write_report(path: Path, values: Mapping[str, Any]) -> Path:
    return write_text(path, render(values))


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
        f"<title>gcfast: {escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
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
        parts.append(f"<p>{_prose(sentence(str(details.get('reason', ''))))}</p>")
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
