"""`recon plan`: shows which layers would be branched and what that would cost, and changes nothing."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import recon
from recon.support.tables import text_table
from recon_cli.options import selection
from recon_cli.options.pictures import add_picture_options, check_pictures, show_pictures
from recon_cli.options.problem import PROBLEM_NAMES, add_problem, problem_of
from recon_cli.options.rename import renames
from recon_cli.parser import Report, add_verb, command_words, seed
from recon_cli.terminal import tell
from recon_cli.texts.costs import cost_table, with_ratios
from recon_cli.texts.evidence import score_text, verdict_table, verdicts
from recon_cli.texts.map_fit import fit_data, fit_line, match_map

if TYPE_CHECKING:
    from recon.plans import Choice, CostModel, Match
    from recon_cli.parser import Verbs
    from recon_cli.texts.costs import CostsByName


def add_parser(verbs: Verbs) -> None:
    """Add the verb to the root parser."""
    parser = add_verb(
        verbs,
        "plan",
        run,
        "choose layers to branch, and show what that would cost",
        """
        recon plan digits --map map.json --top-k 4
        recon plan digits --map map.json --max-macs 1.25
        recon plan digits --map map.json --max-params 1.05 --max-macs 1.5
        recon plan digits --map map.json --auto
        recon plan digits --map map.json --top-k 4 --by rate --exclude '.*bn\\d'
        recon plan digits --map map.json --max-macs 1.25 --frontier
        recon plan tox21.py:problem --map map.json --share 0.5 --groups 3
        """,
        "Only the pictures are written. `recon convert` accepts the same options and branches the layers.",
    )
    add_problem(parser)
    selection.add_options(parser)
    add_picture_options(parser)
    parser.add_argument("--seed", type=seed, default=0, help="seed of --select random (default: 0)")


def run(args: argparse.Namespace) -> Report:
    """Choose, count and show."""
    selection.check(args)
    check_pictures(args)
    cmap = recon.ConflictMap.load(args.map) if args.map else None
    problem = problem_of(args)
    from recon.experiments.inputs import example_inputs, few_samples, make_model
    from recon.plans import CostModel  # late: these import torch
    from recon.support.network.layers import find_layers
    from recon.support.network.task_layers import wasted_copies

    model = make_model(problem, args.seed)
    found = match_map(cmap, problem, model, renames(args)) if cmap else None
    inputs, samples = few_samples(example_inputs(problem, args.seed))
    costs = CostModel(model, problem.task_names, inputs)
    choice = selection.choose(args, problem, model, found, costs)
    wasted = wasted_copies(model, choice.plan.layers, problem.task_names, inputs)
    for note in wasted:
        tell(f"note: {note}")
    choice = replace(choice, notes=[*choice.notes, *wasted])
    kinds = {layer.name: layer.kind for layer in find_layers(model)}
    shown = show_pictures(args, model, found, costs, choice, samples)
    return _report(args, choice, found, costs, samples, kinds, shown)


def _report(
    args: argparse.Namespace,
    choice: Choice,
    found: Match | None,
    costs: CostModel,
    samples: int,
    kinds: dict[str, str],
    shown: tuple[list[str], dict[str, Any]],
) -> Report:
    layers, runs = _layers(choice, kinds), costs.of(choice.plan.layers).runs
    table = _costs(choice, costs, samples)
    options = command_words(args, PROBLEM_NAMES + selection.NAMES)
    next_command = ["recon", "convert", *options, "--out", "branched"]
    text = [
        *([fit_line(args.map, found), ""] if found else []),
        textwrap.fill(f"{choice}.", 100, break_on_hyphens=False),
        "",
        _layer_table(layers, choice),
        "",
        *selection.groups_lines(choice.plan.layers),
        *([selection.covered_line(choice)] if choice.scores else []),
        *(["", verdict_table(choice)] if choice.sure else []),
        "",
        cost_table(table),
        f"{len(runs)} modules run once per group. {_how(costs)}",
        *shown[0],
        "",
        "Next, branch them:",
        f"  {shlex.join(next_command)}",
    ]
    data = {
        "problem": args.problem,
        "surgery": selection.surgery_name(args, choice.plan),
        "map": fit_data(args.map, found) if found else None,
        "reason": choice.reason,
        "layers": layers,
        "by": choice.by if choice.scores else None,
        "covered": choice.covered if choice.scores else None,
        "never_met": choice.unmeasured,
        "notes": choice.notes,
        "evidence": verdicts(choice),
        "costs": table,
        "runs_per_group": {path: partition.groups for path, partition in runs.items()},
        "traced": costs.traced,
        "unsupported": costs.unsupported,
        **shown[1],
    }
    return Report("\n".join(text), data)


def _layers(choice: Choice, kinds: dict[str, str]) -> list[dict[str, Any]]:
    unit_of = {member: unit for unit, members in choice.units.items() for member in members}
    scored = {name: unit_of.get(name, name) for name in choice.plan.layers}
    return [
        {
            "name": name,
            "type": kinds[name],
            **({"unit": unit_of.get(name)} if unit_of else {}),
            "score": choice.scores.get(scored[name]),
            "share": choice.scores[scored[name]] / (choice.total or 1) if scored[name] in choice.scores else None,
            "parted": choice.parted.get(scored[name]),
            "groups": partition.groups,
        }
        for name, partition in choice.plan.layers.items()
    ]


def _layer_table(layers: list[dict[str, Any]], choice: Choice) -> str:
    unit = ["unit"] if choice.units else []
    header = ["layer", "type", *unit, "copies", choice.by if choice.by != "count" else "score", "share of all"]
    rows = [
        [
            layer["name"],
            layer["type"],
            *([layer["unit"] or "-"] if unit else []),
            str(len(layer["groups"])),
            score_text(layer["score"], choice.by),
            score_text(layer["share"], "rate"),
        ]
        for layer in layers
    ]
    return text_table(header, rows, left=2 + len(unit))


def _costs(choice: Choice, costs: CostModel, samples: int) -> dict[str, CostsByName]:
    """`{before, after, ratio: {parameters, macs, activation_bytes}}`, all but the parameters for one sample."""
    found: dict[str, CostsByName] = {}
    for when, layers in (("before", {}), ("after", choice.plan.layers)):
        of = costs.of(layers)
        found[when] = {
            "parameters": of.parameters,
            "macs": of.macs // samples,
            "activation_bytes": of.activation_bytes // samples,
        }
    return with_ratios(found)


def _how(costs: CostModel) -> str:
    if costs.traced:
        return "Counted on the dataflow of one traced forward."
    return f"Measured by a dry run of the converted model: the forward could not be traced ({costs.unsupported[0]})."
