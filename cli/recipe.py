"""Recipe: optimizer, schedule, clipping, accumulation and precision, as the command line names them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

from recon_cli.parsing import (
    Parser,
    non_negative_number,
    part_below_one,
    positive_integer,
    positive_number,
    steps_or_part,
)

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "cosine", "one-cycle")


@dataclass(frozen=True)
class Recipe:
    """How a training goes; what is None is the problem's own.

    Args:
        optimizer: one of `OPTIMIZERS`.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of the optimizer.
        schedule: one of `SCHEDULES`.
        milestones: epochs after which the schedule `step` multiplies the learning rate by `gamma`.
        gamma: see there.
        warm_up: how long the learning rate rises at first: a number of steps, or below 1 a part of all steps.
        clip: the largest norm of an update.
        accumulate: batches for one step.
        amp: precision of the forward; the model's own if None.
    """

    optimizer: str | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    schedule: str | None = None
    milestones: tuple[int, ...] = ()
    gamma: float | None = None
    warm_up: int | float | None = None
    clip: float | None = None
    accumulate: int = 1
    amp: Literal["bf16", "fp16"] | None = None

    def settings(self) -> dict[str, Any]:
        """The options by name, as plain values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["milestones"] = list(self.milestones)
        return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def add_recipe_options(parser: Parser) -> None:
    """The options that a recipe is made of, but for `--lr`."""
    group = parser.add_argument_group("how it is trained (default: the problem's own optimizer and schedule)")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="torch.optim's, with its defaults")
    group.add_argument("--momentum", type=part_below_one, metavar="M", help="of SGD")
    group.add_argument("--weight-decay", type=non_negative_number, metavar="W", help="of any of them")
    group.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate, from step to step")
    group.add_argument(
        "--milestones",
        type=positive_integer,
        nargs="+",
        metavar="EPOCH",
        help="of --schedule step: multiply the learning rate after these epochs",
    )
    group.add_argument("--gamma", type=positive_number, help="of --schedule step: by this (default: 0.1)")
    group.add_argument(
        "--warm-up",
        type=steps_or_part,
        metavar="STEPS",
        help="let the learning rate rise over so many steps at first, or over a part of all steps, such as 0.05",
    )
    group.add_argument("--clip", type=positive_number, metavar="NORM", help="scale longer updates down to this norm")
    group.add_argument(
        "--accumulate",
        type=positive_integer,
        default=1,
        metavar="N",
        help="take a step for every N batches, with the mean of their updates (default: 1)",
    )
    group.add_argument("--amp", choices=("bf16", "fp16"), help="precision of the forward; fp16 on GPUs only")


def recipe_of(args: argparse.Namespace, epochs: int) -> Recipe:
    """The recipe on the command line.

    Raises:
        CommandLineError: options that do not go together.
    """
    steps, milestones = args.schedule == "step", args.milestones or []
    if (milestones or args.gamma is not None) and not steps:
        args.parser.error("--milestones and --gamma go with --schedule step")
    if steps and not milestones:
        args.parser.error("--schedule step needs --milestones, such as --milestones 10 15")
    if any(later <= earlier for earlier, later in pairwise([0, *milestones, epochs])):
        listed = " ".join(map(str, milestones))
        args.parser.error(f"--milestones {listed} must rise, and lie within the {epochs} epochs")
    if args.momentum is not None and args.optimizer in ("adam", "adamw"):
        args.parser.error(f"--momentum is of SGD, so it does not go with --optimizer {args.optimizer}")
    values = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    return Recipe(**{**values, "milestones": tuple(milestones)})
