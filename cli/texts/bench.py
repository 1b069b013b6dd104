"""What `recon bench` prints at the end. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from recon.experiments import Bench, Run
from recon.experiments.bench import cosines as bench_cosines
from recon.experiments.bench.bench import RESULTS_FILE
from recon.experiments.bench.runs import BenchRuns
from recon.experiments.bench.table import paper_data, paper_table
from recon.experiments.comparison_rows import RunRow
from recon.experiments.inputs import make_model
from recon.problems import paper
from recon_cli.parser import Report


def report(bench: Bench, top_k_reason: str) -> Report:
    """Run what the bench still lacks, write the results file, and report."""
    found = bench.run()
    variants, rows = found.variants, found.comparison.rows
    notes = [*found.notes, *found.comparison.notes]
    backbone = type(make_model(bench.problem, 0)).__name__
    published = paper.results(bench.problem.name, backbone)
    their_cosines = paper.cosines(bench.problem.name, backbone)
    data = bench.save(
        {
            "top_k": found.top_k,
            "backbone": backbone,
            "threads": torch.get_num_threads(),
            "seeds": bench.seeds,
            "profiled_steps": found.cmap.steps,
            "rows": [{**row.as_dict(), "paper": paper_data(row, published)} for row in rows],
            "runs": [_without_history(run) for of_seeds in found.runs.values() for run in of_seeds],
            "seconds_per_step": found.seconds,
            "cosines": bench_cosines.data(found.cosines, their_cosines) if found.cosines else None,
            "branched_layers": {v.label: [list(plan.layers) for plan in v.plans] for v in variants if v.plans},
            "notes": notes,
        }
    )
    text = [
        *_head(bench, found, top_k_reason, backbone),
        "",
        found.comparison.text_by_method(),
        "",
        *notes,
        *_published(bench, rows, published),
        *_cosines(bench, found, their_cosines),
        f"Saved in {bench.folder}: {RESULTS_FILE}, every run as `recon train` writes it, and pictures. The same "
        "command again prints this from there.",
    ]
    found.draw(bench.folder)
    return Report("\n".join(text), data)


def _head(bench: Bench, found: BenchRuns, top_k_reason: str, backbone: str) -> list[str]:
    settings, problem = bench.settings, bench.problem
    recipe = settings.recipe
    lines = []
    if settings.preset == "quick":
        lines.append("A REDUCED run, not the paper's: `--preset paper` trains as the paper does.")
    test = "all test data" if settings.test_batches is None else f"at most {settings.test_batches} test batches"
    schedule = "the problem's own schedule" if recipe.schedule is None else f"schedule {recipe.schedule}"
    return [
        f"{problem.name}, {backbone}, preset {settings.preset}: {settings.steps}, {schedule}, {bench.seeds} seed(s), "
        f"evaluated on {test}.",
        *lines,
        f"Recon branches K={found.top_k} layers ({top_k_reason}) of {len(found.cmap.layers)}, by conflicts below "
        f"S={settings.threshold:g} in {found.cmap.steps} steps.",
        "Mean ± standard deviation over the seeds. Δm is against one model for each task. #P counts parameters; "
        "multiply-adds are",
        f"of one sample's forward; ms/step was measured for all in turn on {_machine(bench)}. Ratios are to joint "
        "training.",
    ]


def _machine(bench: Bench) -> str:
    return "a GPU" if bench.settings.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"


def _published(bench: Bench, rows: Sequence[RunRow], table: paper.PaperTable | None) -> list[str]:
    if table is None:
        return [f"The paper ({paper.SOURCE}) has no results on this problem with this network.", ""]
    return [
        f"The paper's figures for the same rows ({paper.SOURCE}, table {table.number}; means of 3 seeds, its own data, "
        "epochs and code):",
        "",
        paper_table(rows, table),
        "",
    ]


def _cosines(bench: Bench, found: BenchRuns, table: paper.CosineTable | None) -> list[str]:
    before, after = found.before, found.after
    if before is None:
        return ["Add joint to --methods to see how often gradients conflict before and after branching.", ""]
    every = "every step" if bench.settings.count_every == 1 else f"one step in {bench.settings.count_every}"
    bins = "the paper's bins" if table else "the paper's bins on Multi-Fashion+MNIST"
    theirs = f"; in brackets the paper's, table {table.number}" if table else ""
    lines = [
        f"Cosines between the tasks' gradients over all shared parameters, % in {bins}{theirs}; counted at {every}:",
        "",
        bench_cosines.whole_table(found.cosines, table),
        "",
    ]
    if after is None or not bench_cosines.kept_layers(before, after):
        return lines
    kept = len(bench_cosines.kept_layers(before, after))
    return [
        *lines,
        f"The same layer by layer, over the {kept} layers that stay shared:",
        "",
        bench_cosines.layers_table(before, after, table),
        "",
    ]


def _without_history(run: Run) -> Mapping[str, object]:
    return {name: value for name, value in asdict(run).items() if name != "history"}
