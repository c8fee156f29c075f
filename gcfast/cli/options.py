"""The command line's arguments: what they are called, what they accept, what they default to."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from gcfast._version import __version__
from gcfast.cli.data.datasets import DATASETS
from gcfast.cli.training.models import ACTIVATIONS, MODELS
from gcfast.cli.training.train import BASES, LOSSES

_EXIT_CODES = (
    "exit codes: 0 done, 1 the run broke down or (certify) the condition was not proved, 2 bad input,"
    " 130 interrupted"
)


class _Parser(argparse.ArgumentParser):
    """One line for a bad argument, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


Command = Callable[[argparse.Namespace, Sequence[str]], int]


def parser(run_train: Command, run_certify: Command, run_info: Command) -> argparse.ArgumentParser:
    """The whole command line; each command's function is found as ``options.run``."""
    top = _Parser(
        prog="gcfast",
        description="Training that provably reaches a global minimum, with a certificate of why.",
        epilog=_EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"gcfast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train in two phases, certify, solve, compare, report", epilog=_EXIT_CODES
    )
    _data_arguments(train)
    model = train.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, default="mlp")
    model.add_argument(
        "--hidden", type=_sizes, metavar="N,N", help="layers below the wide one (mlp), or the first width"
    )
    model.add_argument(
        "--width", type=_count, metavar="N", help="width of the wide layer, at least n (default: 1.1 n)"
    )
    model.add_argument("--activation", choices=tuple(ACTIVATIONS), default="softplus")
    training = train.add_argument_group("training")
    training.add_argument(
        "--base", choices=tuple(BASES), default="sgd", help="the base optimizer (default: sgd)"
    )
    rates = "; ".join(f"{name} {most:g}, at most {over:g} / width" for name, (most, over) in BASES.items())
    training.add_argument("--lr", type=_positive, metavar="X", help=f"learning rate (default: {rates})")
    training.add_argument(
        "--momentum", type=_share, metavar="X", help="of sgd (default: 0.9) and rmsprop (default: 0)"
    )
    training.add_argument("--batch-size", type=_count, metavar="N", default=64)
    training.add_argument(
        "--epochs", type=_count, metavar="N", help="default: 100 for digits and semeion, else 20"
    )
    training.add_argument(
        "--tau",
        type=_inner_share,
        metavar="X",
        default=0.6,
        help="share of the steps in phase one (default: 0.6)",
    )
    training.add_argument(
        "--perturbation", type=_positive, metavar="X", default=1e-3, help="size of the Gaussian step at tau"
    )
    training.add_argument("--loss", choices=LOSSES, default="cross_entropy")
    training.add_argument(
        "--target-gap", type=_positive, metavar="X", default=1e-6, help="L - L* to reach (default: 1e-6)"
    )
    training.add_argument(
        "--no-compare", action="store_true", help="do not train the base optimizer alone as well"
    )
    train.add_argument("--out", type=Path, metavar="DIR", help="default: gcfast-out/DATA-MODEL-seedN")
    _machine_arguments(train)
    train.add_argument("--quiet", action="store_true", help="print nothing but errors and the report's path")
    train.set_defaults(run=run_train)

    certify = commands.add_parser(
        "certify", help="the certificate of a checkpoint on data", epilog=_EXIT_CODES
    )
    certify.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint.pt of a gcfast train"
    )
    _data_arguments(certify)
    certify.add_argument("--json", action="store_true", help="print the certificate as JSON")
    certify.add_argument(
        "--sharp", action="store_true", help="spend more time on the smallest singular value's bound"
    )
    certify.add_argument(
        "--keep",
        metavar="FILE",
        type=Path,
        help="keep the state of a long proof in FILE every two minutes, and go on from it after a kill",
    )
    _machine_arguments(certify)
    certify.set_defaults(run=run_certify)

    info = commands.add_parser("info", help="versions, devices, and which backends are usable here")
    info.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    info.set_defaults(run=run_info)
    return top


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    certify = parser.prog.endswith("certify")
    kept = "the checkpoint's" if certify else "all"
    parser.add_argument("data", metavar="DATA", choices=DATASETS, help=", ".join(DATASETS))
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-root", type=Path, metavar="PATH", help="where the data's files are; nothing is downloaded"
    )
    group.add_argument("--limit", type=_count, metavar="N", help=f"training samples to use (default: {kept})")
    group.add_argument(
        "--test-limit", type=_count, metavar="N", help=f"test samples to use (default: {kept})"
    )
    group.add_argument(
        "--image-size", type=_count, metavar="N", help="resize images of DATA=folder to this square"
    )
    group.add_argument(
        "--seed",
        type=_natural,
        metavar="N",
        default=None if certify else 0,
        help="of split, weights, batch order and Gaussian step",
    )


def _machine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    group.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _number(
    text: str, expected: str, accept: Callable[[float], bool], convert: Callable[[str], float]
) -> float:
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not accept(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _count(text: str) -> int:
    return int(_number(text, "a whole number of at least 1", lambda value: value >= 1, int))


def _natural(text: str) -> int:
    return int(_number(text, "a whole number from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32, int))


def _positive(text: str) -> float:
    return _number(text, "a positive number", lambda value: 0 < value < math.inf, float)


def _share(text: str) -> float:
    return _number(text, "a number from 0 up to, not including, 1", lambda value: 0 <= value < 1, float)


def _inner_share(text: str) -> float:
    return _number(text, "a number between 0 and 1", lambda value: 0 < value < 1, float)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))
