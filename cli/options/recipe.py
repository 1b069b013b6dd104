"""The options that make a recipe: for `recon train`, and some for `recon profile` and `recon bench`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from recon.errors import UsageError
from recon.experiments import Recipe
from recon.experiments.recipe import OPTIMIZERS, SCHEDULES
from recon_cli.parser import (
    Parser,
    batches_or_tasks,
    non_negative_number,
    part_below_one,
    positive_integer,
    positive_number,
    steps_or_part,
)

Group = argparse._ArgumentGroup  # what add_argument_group gives has no public name


def add_recipe_options(parser: Parser) -> None:
    """Add the options that a recipe is made of, except `--lr`."""
    group = parser.add_argument_group("how it is trained (default: the problem's own optimizer and schedule)")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="torch.optim's, with its defaults")
    group.add_argument("--momentum", type=part_below_one, metavar="M", help="momentum of SGD")
    group.add_argument("--weight-decay", type=non_negative_number, metavar="W", help="weight decay, of any optimizer")
    group.add_argument("--schedule", choices=SCHEDULES, help="how the learning rate changes from step to step")
    group.add_argument(
        "--milestones",
        type=positive_integer,
        nargs="+",
        metavar="EPOCH",
        help="of --schedule step: multiply the learning rate after these epochs",
    )
    group.add_argument("--gamma", type=positive_number, help="of --schedule step: the factor (default: 0.1)")
    group.add_argument(
        "--warm-up",
        type=steps_or_part,
        metavar="STEPS",
        help="let the learning rate rise over the first STEPS steps, or over a part of all steps, such as 0.05",
    )
    add_step_options(group)


def add_step_options(group: Group) -> None:
    """Add the options that say how a step is taken."""
    group.add_argument("--clip", type=positive_number, metavar="NORM", help="scale longer updates down to this norm")
    add_accumulate(group)
    group.add_argument("--amp", choices=("bf16", "fp16"), help="precision of the forward; fp16 on GPUs only")


def add_accumulate(group: Group) -> None:
    """Add the option that says which batches make a step."""
    group.add_argument(
        "--accumulate",
        type=batches_or_tasks,
        default=1,
        metavar="N",
        help="take a step for every N batches, with the mean of their updates (default: 1); or tasks: one joint step "
        "of as many batches as it takes to see each task",
    )


def recipe_of(args: argparse.Namespace, epochs: int) -> Recipe:
    """The recipe on the command line."""
    values = {field.name: getattr(args, field.name) for field in fields(Recipe)}
    recipe = Recipe(**{**values, "milestones": tuple(args.milestones or ())})
    try:
        recipe.check(epochs)
    except UsageError as error:
        args.parser.error(str(error))
    return recipe
