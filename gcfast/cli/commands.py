"""The command ``gcfast``: two-phase training on real data, certificates of checkpoints, information."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gcfast.cli.data.datasets import load_dataset
from gcfast.cli.data.split import DataSplit
from gcfast.cli.options import parser
from gcfast.cli.progress import ProgressBar
from gcfast.cli.report.page import write_report
from gcfast.cli.report.summary import print_summary
from gcfast.cli.training.checkpoint import DataSpec, RunCheckpoint
from gcfast.cli.training.models import ModelSpec, default_hidden
from gcfast.cli.training.record import certificate_values, versions
from gcfast.cli.training.run import Run
from gcfast.cli.training.train import Diverged, Settings, default_lr, targets_for
from gcfast.errors import UserError, import_optional


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parser(_train, _certify, _info).parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        command: Callable[[argparse.Namespace, Sequence[str]], int] = options.run
        return command(options, arguments)
    except KeyboardInterrupt:
        print("gcfast: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, Diverged) as error:
        if options.debug:
            raise
        # The library's own checks raise ValueError with a message meant for people.
        text = str(error) or type(error).__name__
        print(f"gcfast {options.command}: error: {' '.join(text.split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    finally:
        torch.set_num_threads(threads)


def _device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: {name} asked for, but torch sees no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device: {name} asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu, cuda or cuda:1, got {name!r}")
    return str(device)


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import_optional("matplotlib.figure", "the report")  # before the training, not after it
    device = _device(options.device)
    data = load_dataset(
        options.data,
        options.data_root,
        options.limit,
        options.test_limit,
        options.seed,
        image_size=options.image_size,
    )
    spec = _model_spec(options, data)
    settings = _settings(options, device, spec.wide)
    if len(data.y_train) <= settings.batch_size and settings.epochs == 1:
        raise UserError(
            "--epochs: one epoch of one batch is a single step, expected at least one in each phase"
        )
    out = options.out or Path("gcfast-out") / f"{options.data}-{options.model}-seed{options.seed}"
    _make_folder(out)

    def say(text: str = "") -> None:
        if not options.quiet:
            print(text, flush=True)

    base = settings.base
    say(
        f"{data.name}: {len(data.y_train):,} training and {len(data.y_test):,} test samples from"
        f" {data.source}"
    )
    say(
        f"{spec.describe()}, {spec.activation}; A({base}), lr {settings.lr:g}, {settings.epochs} epochs,"
        f" tau {settings.tau:g}"
    )
    _warn_of_memory(len(data.y_train), spec.wide, say)
    data_spec = DataSpec(
        data.name,
        options.limit,
        options.test_limit,
        options.seed,
        options.image_size,
        data.mean,
        data.std,
        data.fingerprint(),
    )
    run = Run(data, data_spec, spec, settings, out, shlex.join(["gcfast", *arguments]), quiet=options.quiet)
    code = 0
    try:
        run.execute()
    except KeyboardInterrupt:
        run.record.status, code = "interrupted", 130
        run.record.notes.append(
            f"Interrupted during {_STAGE_NAMES[run.record.stage]}; what was finished is here."
        )
    except Diverged as trouble:
        run.record.status, code = "diverged", 1
        run.record.notes.append(
            f"Training diverged: {trouble}. Try --lr {settings.lr / 4:g}; the wide layer makes the last"
            " layer's loss steep."
        )
    run.save_result()
    report = write_report(out / "report.html", run.record.values())
    if code:
        print(f"gcfast train: {run.record.notes[-1]}", file=sys.stderr)
    say()
    if not options.quiet:
        print_summary(run.record.values())
    say(f"report       {report}")
    if options.quiet:
        print(report)
    return code


_STAGE_NAMES = {
    "start": "the start",
    "phase_one": "phase one",
    "certify": "the certificate",
    "solve": "the solving of phase two",
    "phase_two": "the paper's phase two",
    "base": "the base optimizer's run",
    "done": "the report",
}


_SMALL = ("digits", "semeion")  # seconds an epoch are few, so take more of them


def _settings(options: argparse.Namespace, device: str, width: int) -> Settings:
    if options.momentum is not None and options.base not in ("sgd", "rmsprop"):
        raise UserError(f"--momentum: only sgd and rmsprop take one, --base is {options.base}")
    momentum = options.momentum if options.momentum is not None else 0.9 if options.base == "sgd" else 0.0
    return Settings(
        base=options.base,
        lr=options.lr or default_lr(options.base, width),
        momentum=momentum,
        batch_size=options.batch_size,
        epochs=options.epochs or (100 if options.data in _SMALL else 20),
        tau=options.tau,
        perturbation=options.perturbation,
        loss=options.loss,
        target_gap=options.target_gap,
        seed=options.seed,
        compare=not options.no_compare,
        device=device,
        threads=options.threads,
    )


def _model_spec(options: argparse.Namespace, data: DataSplit) -> ModelSpec:
    n = len(data.y_train)
    suggested = math.ceil(1.1 * n)
    width = options.width or suggested
    if width < n:
        raise UserError(
            f"--width: {width} is less than the n = {n} training samples, and the guarantee needs at least"
            " n; give"
            f" --width {suggested} (the default, 1.1 n) or at most --limit {width}"
        )
    hidden = options.hidden or default_hidden(options.model, data.shape)
    if options.model == "resnet18" and len(hidden) != 1:
        raise UserError(f"--hidden: resnet18 takes one number, its first stage's width, got {options.hidden}")
    return ModelSpec(options.model, data.shape, data.classes, hidden, width, options.activation)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out: expected a folder, {error.filename} is a file") from error
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise UserError(f"--out: no permission to write in {out}")


def _warn_of_memory(n: int, width: int, say: Callable[[str], None]) -> None:
    # Features and two n x n matrices in float64: what the direct certificate cannot do without.
    needed = 8 * n * (width + 1) + 16 * n * n
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return
    if needed > free:
        say(
            f"note: certificate and solver will want about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are"
            " free;"
            " --limit lowers it"
        )


def _certify(options: argparse.Namespace, _: Sequence[str]) -> int:
    from gcfast.certificate import certify

    device = _device(options.device)
    checkpoint = RunCheckpoint.load(options.checkpoint)
    stored = checkpoint.data
    same = stored.name == options.data
    data = load_dataset(
        options.data,
        options.data_root,
        options.limit or (stored.limit if same else None),
        options.test_limit or (stored.test_limit if same else None),
        stored.seed if options.seed is None else options.seed,
        image_size=options.image_size or (stored.image_size if same else None),
        statistics=(stored.mean, stored.std),
    )
    if data.shape != checkpoint.model.shape:
        raise UserError(
            f"DATA: inputs are {data.shape}, the checkpoint's model takes {checkpoint.model.shape}"
        )
    if data.classes > checkpoint.model.classes:
        raise UserError(
            f"DATA: {data.classes} classes, the checkpoint's model has {checkpoint.model.classes} outputs"
        )
    if data.fingerprint() != stored.fingerprint:
        print(
            "gcfast certify: note: these are not the samples the checkpoint was trained on", file=sys.stderr
        )
    model = checkpoint.build().to(device)
    targets = targets_for(checkpoint.loss, data.y_train, checkpoint.model.classes)
    with ProgressBar("certificate", 1000, quiet=options.json) as progress:
        found = certify(
            model,
            (data.x_train.to(device), targets.to(device)),
            loss=checkpoint.loss,
            sharp=options.sharp,
            checkpoint=options.keep,
            callback=lambda step, fraction: progress.update(round(1000 * fraction), step),
        )
    print(json.dumps(certificate_values(found), indent=2) if options.json else str(found))
    return 0 if found.status == "holds" else 1


def _info(_options: argparse.Namespace, _: Sequence[str]) -> int:
    for name, version in versions().items():
        print(f"{name:<10} {version}")
    print(f"{'cpu':<10} {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            print(
                f"cuda:{index}     {properties.name}, {memory:.0f} GiB, compute"
                f" {properties.major}.{properties.minor}"
            )
    else:
        built = torch.version.cuda
        print(
            f"{'cuda':<10} no device"
            + (f" (torch was built with CUDA {built})" if built else " (torch without CUDA)")
        )
    from gcfast.ops import backends

    print(f"\n{backends()}")
    return 0
