"""`recon bench`, on a problem of a second: what it trains, counts and prints; interruptions; wrong input."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

import recon
from recon.experiments.bench import cosines as bench_cosines
from recon.experiments.bench.job import folder_name
from recon.experiments.bench.presets import paper as paper_preset
from recon.experiments.bench.presets import quick
from recon.experiments.bench.settings import first_batches
from recon.experiments.bench.table import paper_table
from recon.experiments.comparison import Comparison
from recon.experiments.comparison_rows import RunRow, spread
from recon.experiments.run import Run
from recon.experiments.training.run_folder import RunFolder
from recon.maps.counts import LayerConflicts, bin_edges
from recon.problems import paper
from recon.problems.problem import ReducedRun
from recon.problems.sets import digits
from recon.profiling.conflict_counter import ConflictCounter, Counting, read_cosines
from recon.training.evaluation import directions
from recon_cli.main import main
from tests.ranks import PATIENCE

SIZE = "--train-samples 256 --test-batches 1 --profile-epochs 1 --workers 1"
LABELS = ["single-task", "joint", "joint + Recon K=4", "joint + random K=4", "joint + max_macs=1.6"]


@pytest.fixture
def files(tmp_path):
    return tmp_path


@pytest.fixture
def bench_of(command):
    """Runs a bench of digits that must succeed; gives its output and its results file."""

    def bench_of(options, out="out"):
        code, text, err = command(f"bench digits {SIZE} --out {out} {options}")
        assert code == 0, err
        with open(f"{out}/results.json") as file:
            return text, json.load(file)

    return bench_of


def test_the_whole_table(bench_of, ask, files):
    text, found = bench_of("--epochs 1 --seeds 2 --methods joint pcgrad --top-k 4 --max-macs 1.6")
    labels = [*LABELS, "pcgrad", "pcgrad + Recon K=4"]
    assert [row["label"] for row in found["rows"]] == labels
    assert found["finished"] and found["top_k"] == 4
    assert "A REDUCED run" in text and "K=4 layers (as asked) of 18" in text and "schedule" in text

    # Each run is one that the other verbs know.
    runs = {label: [Run.load(files / "out" / folder_name(label) / f"seed-{s}") for s in (0, 1)] for label in labels}
    assert all(run.finished and run.label == label for label, of_seeds in runs.items() for run in of_seeds)
    compared = ask("compare out/joint/seed-1 out/joint-Recon-K=4/seed-1 out/single-task/seed-1")
    by_name = {row["name"]: row for row in compared["rows"]}
    ours = {row["label"]: row for row in found["rows"]}
    assert by_name["out/joint-Recon-K=4/seed-1"]["delta_m"] == ours["joint + Recon K=4"]["delta_m_by_seed"][1]
    evaluated = ask("evaluate digits --model out/joint-Recon-K=4/seed-0")
    assert set(evaluated["results"]) == {"top_left", "bottom_right"}

    # Means and spreads in the table are those of the runs.
    lower = directions(digits.digits().tasks)
    deltas = [
        recon.delta_m(run.results, alone.results, lower)
        for run, alone in zip(runs["pcgrad"], runs["single-task"], strict=True)
    ]
    (line,) = [line for line in text.splitlines() if line.startswith("pcgrad  ") and "±" in line]
    assert f"{fmean(deltas):+.2f} ± {stdev(deltas):.2f}" in line
    accuracies = [run.results["top_left"]["accuracy"] for run in runs["pcgrad"]]
    assert f"{fmean(accuracies):.4f} ± {stdev(accuracies):.4f}" in line
    assert "w/ Recon K=4" in text and "w/ max_macs=1.6" in text

    # The plans: the map's first four for both seeds, another four at random for each, and one within the budget.
    cmap = recon.ConflictMap.load(files / "out" / "map.json")
    chosen = found["branched_layers"]
    model = digits.digits().make_model()
    assert chosen["joint + Recon K=4"] == [list(recon.plan(cmap, model, top_k=4).layers)] * 2
    assert len(set(map(tuple, chosen["joint + random K=4"]))) == 2
    joint = runs["joint"][0].macs
    assert 1 < runs["joint + max_macs=1.6"][0].macs / joint <= 1.6 < runs["joint + Recon K=4"][0].macs / joint
    assert set(found["seconds_per_step"]) == set(labels)

    # What was counted while they trained: two steps, of which the first alone is looked at (each fourth is).
    counted = recon.ConflictMap.load(files / "out" / "joint" / "seed-0" / "conflicts.json")
    assert counted.steps == 1 and [layer.name for layer in counted.layers] == [layer.name for layer in cmap.layers]
    assert read_cosines(files / "out" / "joint" / "seed-0").sum() == 1
    for shares in found["cosines"]["whole"].values():
        assert sum(shares) == pytest.approx(1)
    assert (files / "out" / "conflicts_by_layer.png").exists()
    assert not list(files.glob("out/**/best"))  # evaluated once, the last model is the best

    # More seeds are added to what is there; other settings are refused.
    before = {path: path.stat().st_mtime_ns for path in files.glob("out/*/seed-[01]/run.json")}
    _, found = bench_of("--epochs 1 --seeds 3 --methods joint --top-k 4 --controls none")
    assert [len(row["delta_m_by_seed"]) for row in found["rows"]] == [3, 3, 3]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_bench_goes_on_as_if_it_had_never_stopped(bench_of, command, monkeypatch, files):
    options = "--epochs 2 --seeds 1 --methods joint --top-k 3 --controls none"
    _, whole = bench_of(options, out="whole")
    end_epoch, calls = RunFolder.end_epoch, []

    def interrupted(self, epoch):
        calls.append(epoch.number)
        if len(calls) == 6:  # the third training's first epoch is done
            raise KeyboardInterrupt
        end_epoch(self, epoch)

    monkeypatch.setattr(RunFolder, "end_epoch", interrupted)
    code, out, err = command(f"bench digits {SIZE} --out parts {options}")
    assert code == 1 and out == ""
    assert "Interrupted. parts keeps what was trained." in err and "recon bench digits --train-samples 256" in err
    assert json.loads((files / "parts" / "results.json").read_text())["finished"] is False
    assert len(list(files.glob("parts/**/training.checkpoint"))) > 0
    monkeypatch.setattr(RunFolder, "end_epoch", end_epoch)
    _, parts = bench_of(options, out="parts")
    assert not list(files.glob("parts/**/*.checkpoint"))
    for row, same in zip(whole["rows"], parts["rows"], strict=True):
        assert row["results_by_seed"] == same["results_by_seed"]
    assert whole["cosines"] == parts["cosines"]


def test_a_killed_bench_leaves_no_worker_behind(files, bench_of):
    options = f"{SIZE} --epochs 400 --seeds 1 --methods joint --top-k 3 --controls none --out out".split()
    options[options.index("--workers") + 1] = "2"
    process = subprocess.Popen(
        [sys.executable, "-m", "recon_cli", "bench", "digits", *options], cwd=files, stderr=subprocess.DEVNULL
    )
    log = files / "out" / "joint-Recon-K=3" / "seed-0" / "training.log"
    deadline = time.monotonic() + PATIENCE
    while not (log.exists() and "epoch 1/" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline, left = time.monotonic() + PATIENCE, ""
    while log.read_text() != left:
        assert time.monotonic() < deadline, "a worker trains on"
        left = log.read_text()
        time.sleep(2)
    assert not Run.load(log.parent).finished


def test_another_data_sets_map_gets_rows_of_its_own(bench_of, files, refused):
    options = "--epochs 1 --seeds 1 --methods joint --top-k 3 --controls none"
    bench_of(options)
    other = json.loads((files / "out" / "map.json").read_text())
    counts_of = ("histogram", "conflicts", "observed", "series", "below", "pair_series")
    counted = [{name: layer[name] for name in counts_of} for layer in other["layers"]]
    for layer, counts in zip(other["layers"], reversed(counted), strict=True):
        layer.update(counts)
    other["made_by"]["problem"] = "elsewhere"
    (files / "other.json").write_text(json.dumps(other))
    text, found = bench_of(options + " --map other.json")
    labels = ["single-task", "joint", "joint + Recon K=3", "joint + Recon* K=3"]
    assert [row["label"] for row in found["rows"]] == labels and "w/ Recon* K=3" in text
    theirs = recon.plan(recon.ConflictMap.load(files / "other.json"), digits.digits().make_model(), top_k=3)
    assert found["branched_layers"]["joint + Recon* K=3"] == [list(theirs.layers)]
    assert found["branched_layers"]["joint + Recon K=3"] != [list(theirs.layers)]
    # Without the map they are left out again; another one would mix two maps under one name.
    bench_of(options)
    other["made_by"]["problem"] = "elsewhere still"
    (files / "another.json").write_text(json.dumps(other))
    refused(f"bench digits {SIZE} --out out {options} --map another.json", "--map of another data set was")


def test_a_map_of_the_same_problem_takes_the_profiles_place(bench_of, files):
    options = "--epochs 1 --seeds 1 --methods joint --top-k 3 --controls none"
    _, first = bench_of(options)
    _, second = bench_of(f"{options} --map out/map.json", out="again")
    assert not (files / "again" / "map.json").exists()
    assert first["branched_layers"] == second["branched_layers"]
    assert [row["label"] for row in second["rows"]] == ["single-task", "joint", "joint + Recon K=3"]


def test_all_controls_json_and_no_plan_within_the_budget(ask):
    data = ask(
        f"bench digits {SIZE} --out out --epochs 1 --seeds 1 --methods pcgrad --controls all --max-macs 1.01 --top-k 2",
        *("--exclude", ".*bn", r".*bn\d", "--units", r"blocks\.\d"),
    )
    assert [row["label"] for row in data["rows"]] == [
        "single-task",
        "pcgrad",
        "pcgrad + Recon K=2",
        "pcgrad + random K=2",
    ]
    (note,) = data["notes"]
    assert note.startswith("No budgeted plan: No layer fits max_macs=1.01")
    assert data["settings"]["--epochs"] == 1 and data["versions"]["recon"]
    assert data["settings"]["--units"] == [r"blocks\.\d"]
    names = [layer.name for layer in recon.ConflictMap.load("out/map.json").layers]
    assert names == ["stem.conv", "blocks.0", "blocks.1", "blocks.2"]
    for (branched,) in data["branched_layers"].values():  # two of the four: a block is branched whole
        assert all(f"{name.rpartition('.')[0]}.conv2" in branched for name in branched if name.endswith("conv1"))
        assert len({".".join(name.split(".")[:2]) for name in branched}) == 2
    assert all(row["paper"] is None for row in data["rows"])


@pytest.mark.parametrize(
    "options, words",
    [
        ("--methods joint pcgard", "Did you mean 'pcgrad'"),
        ("--methods joint joint", "names a method twice"),
        ("--top-k 99", "SmallResNet has only 20 layers"),
        ("--layers stam.conv", "Did you mean 'stem.conv'"),
        ("--top-k 5 --exclude heads.* .*bn.? .*[01] --units blocks.*", "has only 2 layers that the profile counts in"),
        ("--map same.json --layers .*", "--layers is for the profile, but the map in --map takes its place"),
        ("--map missing.json", "missing.json"),
        ("--map strange.json", "another architecture"),
        ("--rename a=b", "--rename goes with --map"),
        ("--seeds 0", "at least 1"),
        ("--out full", "holds other files"),
        ("--out wrong", "not a results file"),
        ("--preset slow", "invalid choice"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_trained(options, words, refused, files):
    (files / "full").mkdir()
    (files / "full" / "other.txt").write_text("")
    (files / "wrong").mkdir()
    (files / "wrong" / "results.json").write_text('{"rows": []}')
    layer = LayerConflicts("nowhere", "", {}, None, None, None, score=3)
    strange = recon.ConflictMap(("a", "b"), -0.1, None, None, (), [layer])
    strange.save(files / "strange.json")
    replace(strange, made_by={"problem": "digits"}).save(files / "same.json")
    refused(f"bench digits --out new {options}", words)
    assert not (files / "new").exists()


def test_a_folder_of_other_settings_is_refused(refused, files):
    document = {"format": "recon bench", "version": 1, "settings": {"PROBLEM": "digits", "--epochs": 7}}
    (files / "out").mkdir()
    (files / "out" / "results.json").write_text(json.dumps(document))
    refused(f"bench digits {SIZE} --out out --epochs 2", "--epochs was 7, not 2")


def test_another_network_of_the_same_name_is_refused(refused, command, files):
    net = "from recon.models import SmallResNet\nclass Net(SmallResNet): pass\n"
    make = "def make():\n    model = Net({'top_left': 10, 'bottom_right': 10})\n"
    line = f"bench digits {SIZE} --epochs 1 --methods joint --controls none --seeds 1 --backbone net.py:make --out own"
    (files / "net.py").write_text(f"{net}{make}    return model\n")
    assert command(line)[0] == 0
    (files / "net.py").write_text(f"{net}{make}    model.more = Net({{'a': 2}})\n    return model\n")
    sys.modules.pop("net", None)
    refused(line, "parameters was")


def test_help_does_not_wait_for_torch():
    code = "import sys; from recon_cli.main import main; main(['bench', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--preset {quick,paper}" in done.stdout


def test_whole_gradients_are_counted_over_all_shared_parameters():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 7), "b": torch.nn.Linear(7, 4), "one": torch.nn.Linear(4, 1)})
    counter = ConflictCounter(model, ["x", "y"], Counting(-0.1))
    cosines = []
    for _ in range(40):
        batch, weights = torch.randn(3, 5), torch.randn(4)
        hidden = model["b"](model["a"](batch).tanh())
        losses = {"x": (hidden @ weights).mean(), "y": model["one"](hidden).square().mean()}
        shared = [*model["a"].parameters(), *model["b"].parameters()]  # "one" is y's alone
        x, y = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)]).double()
            for loss in losses.values()
        )
        cosines.append(float(x @ y / (x.norm() * y.norm())))
        counter.backward(losses)
    assert counter.whole_histogram.tolist() == np.histogram(cosines, bin_edges())[0].tolist()


def test_shares_and_their_reduction():
    before, after = np.zeros(200, np.int64), np.zeros(200, np.int64)
    before[[150, 99, 98, 10]] = 4, 3, 2, 1  # cosines from 0.5, -0.01, -0.02 and -0.9
    after[[150, 98]] = 19, 1
    assert bench_cosines.shares(before, (0.0, -0.01, -0.02)) == [0.4, 0.3, 0.2, 0.1]
    assert bench_cosines.reduction(before, after, -0.01) == pytest.approx(1 - (1 / 20) / (3 / 10))
    assert bench_cosines.reduction(after, before, -0.02) is None


def test_first_batches_keep_their_length_and_order():
    loader = [1, 2, 3]
    assert list(first_batches(loader, 2)) == [1, 2] and len(first_batches(loader, 2)) == 2
    assert len(first_batches(loader, 9)) == 3
    assert first_batches(loader, None) is loader
    with pytest.raises(TypeError):
        len(first_batches(iter(loader), 2))


def test_the_presets_ask_the_problem():
    problem = digits.digits()
    assert quick(problem).epochs == 3 and paper_preset(problem).methods[-1] == "cagrad"
    own = replace(problem, quick=ReducedRun(epochs=7, test_batches=None, schedule="cosine"), cagrad_c=0.25)
    preset = quick(own)
    assert (preset.epochs, preset.train_batches, preset.test_batches) == (7, 200, None)
    assert preset.recipe.schedule == "cosine" and paper_preset(own).methods[-1] == "cagrad:c=0.25"


@pytest.mark.parametrize("table", paper.all_results().values(), ids=lambda table: f"table {table.number}")
def test_the_papers_rows_have_its_own_delta_m(table):
    """Checks every figure: Δm from the rows as printed, but for rounding."""
    alone = table.rows["single-task", ""]
    if table.number == 2:
        pytest.skip("its Δm is over 40 tasks, of which it shows the mean")
    higher = {(t, m): not m.endswith(("error", "angle")) for t, m, _ in table.columns}
    for (method, surgery), row in table.rows.items():
        if row.delta_m is None or 0.02 in row.metrics:  # a depth error of one digit
            continue
        changes = {}
        for (task, metric, _), value, base in zip(table.columns, row.metrics, alone.metrics, strict=True):
            change = 100 * (value - base) / base
            changes.setdefault(task, []).append(change if higher[task, metric] else -change)
        delta_m = fmean(fmean(of_task) for of_task in changes.values())
        # Table 5's is about 0.4 lower than its rows say, in all of them.
        assert delta_m == pytest.approx(row.delta_m, abs=0.6 if table.number == 5 else 0.35), (method, surgery)


@pytest.mark.parametrize("table", paper.all_cosines().values(), ids=lambda table: f"table {table.number}")
def test_the_papers_cosines_add_up(table):
    assert table.severe in table.edges
    for row, shares in table.shares.items():
        assert len(shares) == len(table.edges) + 1
        if table.number == 10 and row == ("joint", "random"):  # does not add up in print either
            continue
        assert sum(shares) == pytest.approx(100, abs=0.6)


def row_of(label, method, surgery, metrics, deltas):
    runs = []
    for seed in range(len(deltas)):
        results = {}
        for (task, name), values in metrics.items():
            results.setdefault(task, {})[name] = values[seed]
        runs.append(Run("faces", label, tuple(results), method, surgery, parameters=10**6, macs=1, results=results))
    return RunRow(label, runs, 0.01, deltas=deltas)


def test_the_papers_figures_stand_in_the_rows_of_ours():
    table = paper.results("multi-fashion-mnist", "ResNet18")
    metrics = {("digit", "accuracy"): [0.9], ("fashion", "accuracy"): [0.8]}
    rows = [
        row_of(label, method, surgery, metrics, [0.0])
        for label, method, surgery in [
            ("cagrad:c=0.2 + Recon K=25", "cagrad:c=0.2", "Recon K=25"),
            ("joint + random K=25", "joint", "random K=25"),
        ]
    ]
    first, second = paper_table(rows, table).splitlines()[-2:]
    assert first.split() == ["w/", "Recon", "K=25", "0.9828", "0.8965", "-0.04", "11.4M"]
    assert second.split()[-4:] == ["-"] * 4
    assert paper.results("digits", "SmallResNet") is None


def test_metrics_of_many_tasks_are_averaged_beside_the_papers_average():
    table = paper.results("celeba", "ResNet18")
    tasks = [f"task{i}" for i in range(40)]
    metrics = {(task, "error"): [0.1 + 0.001 * i, 0.1005] for i, task in enumerate(tasks)}
    rows = [row_of("joint", "joint", "", metrics, [0.5, 0.7])]
    text = Comparison(rows, "single-task", "joint", "error", []).text_by_method()
    assert "0.1100 ± 0.0134" in text  # of the two seeds' means, 0.1195 and 0.1005
    assert paper_table(rows, table).splitlines()[-1].split() == ["joint", "0.0833", "+0.55", "11.3M"]


def test_spreads():
    assert spread([0.5]) == "0.5000" and spread([]) == "-"
    assert spread([25.0, 27.0]) == "26.00 ± 1.41"
    assert spread([1.0, 2.0], 2, sign=True) == "+1.50 ± 0.71"


def test_main_knows_the_verb(capsys):
    assert main(["bench"]) == 2
    assert "PROBLEM" in capsys.readouterr().err
