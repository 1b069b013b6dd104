import json
import math
import re
from dataclasses import replace

import pytest

from recon.errors import CheckpointError, UsageError
from recon.experiments.comparison import compare
from recon.experiments.run import RUN_FILE, SINGLE_TASK, Run
from recon.support.tables import short_number, text_table
from recon.training.evaluation import delta_m

DIRECTIONS = {"seg": {"accuracy": True}, "depth": {"error": False, "accuracy": True}}


def run(label="joint", **changes):
    values = {
        "problem": "scenes",
        "label": label,
        "tasks": ("seg", "depth"),
        "method": label,
        "epochs": 2,
        "parameters": 1000,
        "macs": 5000,
        "seconds_per_step": 0.0125,
        "results": {"seg": {"accuracy": 0.8}, "depth": {"error": 0.5, "accuracy": 0.25}},
        "higher_is_better": DIRECTIONS,
        "history": [{"number": 1, "losses": {"seg": 0.5, "depth": 1.5}}],
        "finished": True,
    }
    return Run(**{**values, **changes})


def single(**changes):
    results = {"seg": {"accuracy": 0.4}, "depth": {"error": 1.0, "accuracy": 0.5}}
    return run(**{"label": SINGLE_TASK, "parameters": 2000, "macs": 9000, "results": results, **changes})


def test_a_run_survives_its_file(tmp_path):
    before = run(branched_layers=("stem",), surgery="Recon K=1", seed=3)
    before.save(tmp_path / "new")
    assert Run.load(tmp_path / "new") == before
    assert Run.load(tmp_path / "new" / RUN_FILE) == before


def test_a_metric_that_is_not_finite_is_null_in_the_file(tmp_path):
    run(results={"seg": {"accuracy": math.nan}, "depth": {"error": 0.5, "accuracy": 0.25}}).save(tmp_path)
    assert "NaN" not in (tmp_path / RUN_FILE).read_text()
    assert math.isnan(Run.load(tmp_path).results["seg"]["accuracy"])


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_without_a_run(tmp_path, place):
    with pytest.raises(CheckpointError, match=r"holds no run\.json.*recon train"):
        Run.load(tmp_path / place)


def test_a_truncated_file(tmp_path):
    run().save(tmp_path)
    path = tmp_path / RUN_FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        Run.load(tmp_path)
    assert str(path) in str(caught.value)


WRONG = {
    "format": ("format", "recon conflict map"),
    "version": ("version", 99),
    "no list of tasks": ("tasks", "seg"),
    "numbers for tasks": ("tasks", [1, 2]),
    "a task twice": ("tasks", ["seg", "depth", "seg"]),
    "no layer's name": ("branched_layers", ["stem", None]),
    "half an epoch": ("epochs", 2.5),
    "true epochs": ("epochs", True),
    "negative epochs": ("epochs", -1),
    "negative seed": ("seed", -1),
    "seed too large": ("seed", 2**32),
    "negative parameters": ("parameters", -1000),
    "endless parameters": ("parameters", 10**30),
    "negative multiply-adds": ("macs", -1),
    "word for seconds": ("seconds_per_step", "fast"),
    "negative seconds": ("seconds_per_step", -0.1),
    "number for finished": ("finished", 1),
    "results of one task": ("results", {"seg": {"accuracy": 0.8}}),
    "word for a result": ("results.seg.accuracy", {"seg": {"accuracy": "high"}, "depth": {"error": 0.5}}),
    "no table of results": ("results.seg", {"seg": 0.8, "depth": {"error": 0.5}}),
    "metric without a name": ("results.seg.", {"seg": {"": 0.8}, "depth": {"error": 0.5}}),
    "no direction": ("higher_is_better.seg.accuracy", {"seg": {"accuracy": None}, "depth": {"error": False}}),
    "no list of epochs": ("history", {}),
    "no epoch": ("history[0]", [3]),
    "an epoch without a number": ("history[0].number", [{"losses": {"seg": 1.0}}]),
    "an epoch without losses": ("history[0].losses", [{"number": 1}]),
    "word for a loss": ("history[0].losses.seg", [{"number": 1, "losses": {"seg": "low"}}]),
    "word for an epoch's result": (
        "history[0].results.seg.accuracy",
        [{"number": 1, "losses": {}, "results": {"seg": {"accuracy": "high"}}}],
    ),
    "number for a version": ("versions.torch", {"torch": 2.6}),
    "number for the network": ("backbone", 3),
    "list of settings": ("settings", []),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_field_is_named(tmp_path, wrong):
    named, value = WRONG[wrong]
    field = re.match(r"\w+", named)[0]
    run().save(tmp_path)
    path = tmp_path / RUN_FILE
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, field: value}))
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: field '{named}'")):
        Run.load(tmp_path)
    del document[field]
    path.write_text(json.dumps(document))
    if field in ("backbone", "settings"):  # records of before have neither
        assert getattr(Run.load(tmp_path), field) in ("", {})
        return
    with pytest.raises(CheckpointError, match=f"field '{field}' is missing"):
        Run.load(tmp_path)


def test_numbers_that_are_not_finite_come_back_as_nan(tmp_path):
    history = [{"number": 1, "losses": {"seg": math.inf}, "weights": {"seg": math.nan}, "steps": 3, "seconds": 1.5}]
    run(seconds_per_step=math.inf, history=history).save(tmp_path)
    loaded = Run.load(tmp_path)
    assert math.isnan(loaded.seconds_per_step)
    assert math.isnan(loaded.history[0]["losses"]["seg"]) and math.isnan(loaded.history[0]["weights"]["seg"])


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / RUN_FILE).write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        Run.load(tmp_path)


def test_delta_m_refers_to_the_single_task_run():
    comparison = compare({"one": run(), "two": single()})
    assert comparison.baseline == SINGLE_TASK
    one, two = comparison.rows
    # seg: accuracy doubled, +100 %; depth: error halved and accuracy halved, 0 % on average.
    assert one.delta_m == pytest.approx(50.0)
    assert two.delta_m == 0
    assert one.delta_m == delta_m(one.first.results, two.first.results, DIRECTIONS)


def test_runs_of_several_seeds_are_a_row_and_each_refers_to_the_baseline_of_its_seed():
    ours = [run(results=accuracies(0.8)), run(results=accuracies(0.6), seed=1, parameters=2000)]
    theirs = [single(results=accuracies(0.4)), single(results=accuracies(0.5), seed=1)]
    comparison = compare({"joint": ours, "alone": theirs}, seconds={"joint": 0.25, "alone": 0.5})
    one, two = comparison.rows
    assert list(one.deltas) == pytest.approx([100.0, 20.0]) and one.delta_m == pytest.approx(60.0)
    assert one.parameters == 1500 and two.parameters_ratio == pytest.approx(2000 / 1500)
    assert two.seconds_ratio == 2
    assert "0.7000 ± 0.1414" in comparison.text() and "+60.00 ± 56.57" in comparison.text_by_method()
    found = comparison.as_dict()["rows"][0]["results_by_seed"]
    assert found == {"seg": {"accuracy": [0.8, 0.6]}, "depth": {"accuracy": [0.8, 0.6]}}
    with pytest.raises(UsageError, match="same metrics"):
        compare({"joint": [run(), ours[1]]})


def accuracies(value):
    return {"seg": {"accuracy": value}, "depth": {"accuracy": value}}


def test_a_baseline_that_is_not_in_the_table():
    comparison = compare({"one": run()}, baseline=single())
    assert [row.name for row in comparison.rows] == ["one"]
    assert comparison.rows[0].delta_m == pytest.approx(50.0)


def test_without_a_baseline_there_is_no_delta_m_and_a_note_how_to_get_it():
    comparison = compare({"one": run(), "other": run("uw")})
    assert [row.delta_m for row in comparison.rows] == [None, None]
    assert "--single-task" in comparison.notes[0]


def test_a_baseline_of_zero_leaves_delta_m_out_and_says_why():
    zero = single(results={"seg": {"accuracy": 0.0}, "depth": {"error": 1.0, "accuracy": 0.5}})
    comparison = compare({"one": run(), "two": zero})
    assert comparison.rows[0].delta_m is None
    assert "'seg'" in comparison.notes[0]


def test_ratios_refer_to_the_first_plain_run():
    branched = run("recon", branched_layers=("stem",), parameters=1500, macs=10000)
    comparison = compare({"recon": branched, "single": single(), "plain": run()})
    assert comparison.reference == "plain"
    assert [row.parameters_ratio for row in comparison.rows] == [1.5, 2.0, 1.0]
    assert [row.macs_ratio for row in comparison.rows] == [2.0, 1.8, 1.0]


def test_ratios_refer_to_the_smallest_run_where_none_is_plain():
    branched = run("recon", branched_layers=("stem",), parameters=1500)
    assert compare({"single": single(), "recon": branched}).reference == "recon"


def test_the_mean_is_of_the_metric_that_all_tasks_have_first():
    assert compare({"one": run()}).mean_metric is None  # seg's first is accuracy, depth's is error
    results = {"seg": {"accuracy": 0.8}, "depth": {"accuracy": 0.4}}
    comparison = compare({"one": run(results=results)})
    assert comparison.mean_metric == "accuracy"
    assert comparison.rows[0].mean == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "faces"}, "same problem"),
        ({"tasks": ("seg", "normals")}, "same tasks"),
        ({"results": {"seg": {"iou": 0.8}, "depth": {"error": 0.5, "accuracy": 0.25}}}, "same metrics"),
        ({"finished": False, "results": {}}, "stopped after 1 of 2 epochs.*recon train"),
        ({"finished": False, "results": {}, "history": []}, "never trained.*recon train"),
        ({"finished": False, "results": {}, "method": SINGLE_TASK}, "was stopped.*recon train PROBLEM --single-task"),
        ({"finished": False, "results": {}, "problem": "digits"}, "recon train digits"),
    ],
)
def test_runs_that_cannot_be_compared(changes, message):
    with pytest.raises(UsageError, match=message):
        compare({"one": run(), "two": run(**changes)})
    with pytest.raises(UsageError, match=message):
        compare({"one": run()}, baseline=run(**changes))


def test_different_lengths_of_training_are_noted():
    assert any("one 2, two 5" in note for note in compare({"one": run(), "two": run(epochs=5)}).notes)


def test_different_networks_are_noted():
    words = "different networks: one the problem's own, "
    notes = compare({"one": run(), "two": run(backbone="ResNet18")}).notes
    assert any(f"{words}two ResNet18." in note for note in notes)
    notes = compare({"one": run()}, run(label="single-task", method="single-task", backbone="ViT")).notes
    assert any(f"{words}the baseline 'single-task' ViT." in note for note in notes)
    same = {name: run(backbone="ViT") for name in ("one", "two")}
    assert not any("networks" in note for note in compare(same).notes)


def test_the_table_has_what_the_comparison_says():
    text = compare({"runs/a": run(), "runs/b": single()}).text()
    header, rule, first, second = text.splitlines()
    assert header.split("  ")[0] == "run"
    assert set(rule) == {"-", " "}
    for cell in ("runs/a", "joint", "0.8000", "0.5000", "+50.00", "1.00k (1.00x)", "5.00k (1.00x)", "12.5"):
        assert cell in first
    for cell in ("runs/b", SINGLE_TASK, "0.4000", "+0.00", "2.00k (2.00x)", "9.00k (1.80x)"):
        assert cell in second
    assert len({len(line) for line in (rule, first, second)}) == 1


def test_labels_that_repeat_the_names_are_left_out():
    assert "how" not in compare({"joint": run()}).text().split()
    assert "how" in compare({"folder": run()}).text().split()


def test_forty_tasks_are_summed_up():
    tasks = tuple(f"task{i}" for i in range(40))
    results = {task: {"accuracy": i / 40} for i, task in enumerate(tasks)}
    many = run(tasks=tasks, results=results)
    text = compare({"many": many}).text()
    assert "task7" not in text
    assert "mean accuracy" in text and "0.4875" in text


def test_the_comparison_as_json():
    data = compare({"one": run(seconds_per_step=math.inf), "two": single()}).as_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["rows"][0]["seconds_per_step"] is None
    assert data["rows"][0]["delta_m"] == pytest.approx(50.0)


def test_a_run_that_counts_no_multiply_adds_has_no_ratio():
    comparison = compare({"one": run(macs=0), "two": run("uw")})
    assert comparison.rows[1].macs_ratio is None
    assert "0  " in comparison.text()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (78_042, "78.0k"),
        (434_944, "435k"),
        (999_700, "1.00M"),
        (11_200_000, "11.2M"),
        (123e9, "123G"),
        (4.2e12, "4.20T"),
    ],
)
def test_short_numbers(count, text):
    assert short_number(count) == text


def test_text_tables_align_words_left_and_numbers_right():
    assert text_table(["name", "n"], [["a", "10"], ["abcdef", "9"]]) == "name     n\n------  --\na       10\nabcdef   9"


def test_a_run_is_plain_single_task_or_branched():
    assert run().is_plain and not run().is_single_task
    assert single().is_single_task and not single().is_plain
    assert not replace(run(), branched_layers=("stem",)).is_plain
