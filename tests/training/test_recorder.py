import json

import pytest
import torch

import recon
from recon.errors import CheckpointError, UsageError
from recon.training.history import Epoch
from recon.training.recorder import Recorder, Step, mean_weights, read_records
from tests.methods.test_jacobian import TwoHeads
from tests.profiling.test_profiler import LOSSES, batches, sgd


def step(number, losses=(0.5, 1.5), weights=()):
    tables = [{task: torch.tensor(v) for task, v in zip("ab", values, strict=False)} for values in (losses, weights)]
    return Step(1, number, *tables, lr=0.1)


def test_lines_hold_what_was_noted_and_are_told_to_others(tmp_path):
    told = []
    with Recorder(tmp_path / "new" / "metrics.jsonl", [told.append], seconds=1000) as recorder:
        recorder.step(step(1, weights=(2.0, 0.25)))
        recorder.step(step(2, losses=(0.5, float("nan"))))
        assert not recorder.path.exists() and not told  # nothing is read from the device before there is a reason
        recorder.epoch(Epoch(1, 2, 0.5, {"a": 0.5}, {}, {"a": {"error": float("inf")}}))
        recorder.step(step(3))
    lines = read_records(recorder.path)
    assert lines[0] == {
        "epoch": 1,
        "step": 1,
        "lr": 0.1,
        "losses": {"a": 0.5, "b": 1.5},
        "weights": {"a": 2, "b": 0.25},
    }
    assert lines[1]["losses"] == {"a": 0.5}  # a task without a target
    assert lines[2]["number"] == 1 and lines[2]["results"] == {"a": {"error": None}}
    assert lines[3]["step"] == 3 and len(lines) == 4
    assert [line.get("step") for line in told] == [1, 2, None, 3]


def test_steps_are_written_in_time(tmp_path):
    recorder = Recorder(tmp_path / "metrics.jsonl", seconds=0)
    recorder.step(step(1))
    assert len(read_records(recorder.path)) == 1


def test_a_new_recorder_replaces_an_older_file_and_one_that_goes_on_cuts_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("something old, and long enough to stick out behind the new lines" * 9)
    recorder = Recorder(path)
    recorder.step(step(1))
    state = recorder.state_dict()
    recorder.step(step(2))
    recorder.flush()
    with path.open("a") as file:
        file.write('{"epoch": 1, "st')  # killed while it wrote
    again = Recorder(path)
    again.load_state_dict(state)
    again.step(step(2))
    again.flush()
    assert [line["step"] for line in read_records(path)] == [1, 2]


def test_lines_that_are_lost_are_missed(tmp_path, caplog):
    recorder = Recorder(tmp_path / "metrics.jsonl")
    recorder.step(step(1))
    state = recorder.state_dict()
    recorder.path.unlink()
    again = Recorder(recorder.path)
    again.load_state_dict(state)
    assert "is shorter than when the checkpoint was saved" in caplog.text
    again.step(step(2))
    again.flush()
    assert [line["step"] for line in read_records(recorder.path)] == [2]


def test_files_that_cannot_be_written_or_read(tmp_path):
    (tmp_path / "file").write_text('{"epoch": 1}\n{"ep')
    with pytest.raises(CheckpointError, match=r"file, line 2: .*the steps of a training"):
        read_records(tmp_path / "file")
    recorder = Recorder(tmp_path / "file" / "metrics.jsonl")
    recorder.step(step(1))
    with pytest.raises(UsageError, match="Choose another place"):
        recorder.flush()


def test_mean_weights_are_over_the_steps_in_which_the_task_had_one():
    records = [{"step": 1, "weights": {"a": 1.0, "b": 3.0}}, {"step": 2, "weights": {"b": 1.0}}, {"number": 1}]
    assert mean_weights(records, ["b", "a", "c"]) == {"b": 2.0, "a": 1.0}
    assert list(mean_weights(records, ["b", "a"])) == ["b", "a"]


@pytest.mark.parametrize(("method", "accumulate"), [("pcgrad", 1), ("joint", 1), ("dwa", 2)])
def test_training_records_every_step(tmp_path, method, accumulate):
    data = list(batches(5, a={1}))
    seen = {task: [] for task in LOSSES}

    def recorded(task):
        def loss(out, target):
            seen[task].append(LOSSES[task](out, target))
            return seen[task][-1]

        return loss

    torch.manual_seed(0)
    model = TwoHeads()
    optimizer = sgd(model)
    history = recon.train(
        model,
        data,
        {task: recorded(task) for task in LOSSES},
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        method=method,
        accumulate=accumulate,
        recorder=Recorder(tmp_path / "metrics.jsonl"),
        on_epoch=lambda epoch: epoch.results.update(a={"error": 0.25}),
    )
    steps = [line for line in read_records(tmp_path / "metrics.jsonl") if "step" in line]
    *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(last)["results"] == {"a": {"error": 0.25}} == history.epochs[0].results
    assert [line["step"] for line in steps] == list(range(1, history.steps + 1)) and history.steps == -(
        -5 // accumulate
    )
    assert [line["lr"] for line in steps] == [0.05 * 0.5**n for n in range(len(steps))]
    if accumulate == 1:
        assert "a" not in steps[1]["losses"] and "a" not in steps[1]["weights"]
        for task in LOSSES:
            assert [line["losses"][task] for line in steps if task in line["losses"]] == [v.item() for v in seen[task]]
    else:
        pairs = [seen["b"][i : i + 2] for i in (0, 2, 4)]
        expected = [torch.stack(pair).mean().item() for pair in pairs]
        assert [line["losses"]["b"] for line in steps] == pytest.approx(expected)
    if method == "joint":
        assert all(set(line["weights"].values()) == {1.0} for line in steps)
    means = mean_weights(steps, list(LOSSES))
    if accumulate == 1:
        assert means == pytest.approx(history.epochs[0].weights)
