import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import ProblemError, UsageError
from recon.problems import descriptions, get
from recon.problems.sets.tox21 import FEATURES, TASKS
from recon_cli.main import main

REAL = Path(__file__).parents[3] / "shared" / "data"

needs_the_real_data = pytest.mark.skipif(
    not (REAL / "tox21" / "tox21.csv").is_file(), reason="needs the CSV of Tox21 in ../shared/data"
)


def molecules(count):
    """Chains of carbon and oxygen, each its own, with labels of which some are missing."""
    random = np.random.RandomState(0)
    smiles = [f"{'C' * (i % 20 + 1)}O{'C' * (i // 20)}" for i in range(count)]
    labels = random.choice(["", "0", "0", "1"], (count, len(TASKS)))
    return [[*map(str, row), f"TOX{i}", name] for i, (row, name) in enumerate(zip(labels, smiles, strict=True))]


HEADER = (*TASKS, "mol_id", "smiles")


def write(root, rows, header=HEADER):
    (root / "tox21").mkdir(parents=True, exist_ok=True)
    with (root / "tox21" / "tox21.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path, molecules(250))


def datasets(root, **options):
    return [loader.dataset for loader in get("tox21", data_root=root, **options).make_loaders(0)]


def labels_of_rows(rows):
    return [tuple(float(v) if v else None for v in row[: len(TASKS)]) for row in rows]


def labels(dataset):
    table = torch.stack(list(dataset.targets.values()), dim=1)
    return [tuple(None if v != v else v for v in row) for row in table.tolist()]


# What is read.


def test_every_molecule_is_on_one_side_with_its_labels(root):
    train, test = datasets(root)
    assert len(test) == 50 and sorted(map(str, labels(train) + labels(test))) == sorted(
        map(str, labels_of_rows(molecules(250)))
    )
    for dataset in (train, test):
        assert dataset.inputs.shape == (len(dataset), FEATURES) and dataset.inputs.dtype == torch.uint8


def substrings(smiles):
    return [smiles[i : i + n] for n in (1, 2, 3) for i in range(len(smiles) - n + 1)]


def test_inputs_are_logarithms_of_counts_of_substrings(tmp_path):
    """Molecules of one letter each have one substring of each length: the columns show themselves."""
    chains = [f"{'C' * n}" for n in range(1, 151)]
    rows = [[*["1"] * len(TASKS), "", smiles] for smiles in chains]
    train, test = datasets(write(tmp_path, rows))
    inputs = torch.cat([data[list(range(len(data)))][0] for data in (train, test)])
    counts = inputs.exp() - 1
    for row in counts:
        there = row[row > 0.5].round().int().tolist()
        n = max(there)
        assert sorted(there, reverse=True) == [c for c in (n, n - 1, n - 2) if c > 0]
        assert sum(there) == len(substrings("C" * n))
    assert sorted(counts.amax(dim=1).round().int().tolist()) == list(range(1, 151))


def test_counts_do_not_wrap_around(tmp_path):
    rows = [[*["1"] * len(TASKS), "", f"{'C' * 300}{'O' * n}"] for n in range(200)]
    train, _ = datasets(write(tmp_path, rows))
    assert (train.inputs.max(dim=1).values == 255).all()


def test_case_matters(tmp_path):
    rows = [[*["1"] * len(TASKS), "", letter] for letter in ("C", "c") for _ in range(100)]
    train, test = datasets(write(tmp_path, rows))
    assert len(torch.cat([train.inputs, test.inputs]).unique(dim=0)) == 2


def test_a_molecule_that_occurs_twice_stays_together(tmp_path):
    rows = [[*["1"] * len(TASKS), "", f"{'C' * (i % 100 + 1)}"] for i in range(200)]
    train, test = datasets(write(tmp_path, rows))
    seen = [{tuple(row) for row in data.inputs.tolist()} for data in (train, test)]
    assert (len(train), len(test)) == (160, 40) and not seen[0] & seen[1]


def test_seeds_and_samples_leave_the_split_as_it_is(root):
    problem = get("tox21", data_root=root)
    (train, test), (other, same) = problem.make_loaders(0), problem.make_loaders(1)
    assert torch.equal(train.dataset.inputs, other.dataset.inputs)
    assert torch.equal(test.dataset.inputs, same.dataset.inputs)
    assert not torch.equal(next(iter(train))[0], next(iter(other))[0])
    some, again = datasets(root, train_samples=130)
    assert torch.equal(some.inputs, train.dataset.inputs[:130]) and torch.equal(again.inputs, test.dataset.inputs)


def test_columns_in_any_order_and_labels_as_floats(tmp_path, root):
    order = np.random.RandomState(1).permutation(len(HEADER))
    rows = [[f"{row[i]}.0" if row[i] in ("0", "1") else row[i] for i in order] for row in molecules(250)]
    other = write(tmp_path / "other", rows, [HEADER[i] for i in order])
    for one, same in zip(datasets(root), datasets(other), strict=True):
        assert torch.equal(one.inputs, same.inputs) and labels(one) == labels(same)


def test_a_batch_without_labels_of_a_task_leaves_it_out(tmp_path):
    rows = molecules(250)
    for row in rows:
        row[TASKS.index("SR-p53")] = ""
    for loader in get("tox21", data_root=write(tmp_path, rows)).make_loaders(0):
        for _, targets in loader:
            assert set(targets) == set(TASKS) - {"SR-p53"}


def test_the_problem_without_its_data(root):
    problem = get("tox21", data_root=str(root))
    assert problem.name == "tox21" and problem.description == descriptions()["tox21"]
    (root / "tox21" / "tox21.csv").unlink()
    outputs = problem.make_model()(problem.example_inputs())
    assert {task: output.shape for task, output in outputs.items()} == dict.fromkeys(TASKS, (8, 1))


# Wrong input.


def damaged(column, value):
    rows = molecules(250)
    rows[6][HEADER.index(column)] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (damaged("NR-AhR", "yes"), r"tox21\.csv, line 8: the NR-AhR is 'yes', but must be 0, 1, or empty"),
        (damaged("smiles", " "), r"tox21\.csv, line 8: the smiles is ''"),
        ([*molecules(3), ["0", "1"]], r"tox21\.csv, line 5: there must be 14 entries, but there are 2"),
        ([], r"tox21\.csv has no rows"),
    ],
)
def test_damaged_rows_are_named_by_file_and_line(rows, message, tmp_path):
    with pytest.raises(ProblemError, match=message):
        datasets(write(tmp_path, rows))


def test_missing_columns_are_named(tmp_path):
    header = [name if name != "SR-HSE" else "SR_HSE" for name in HEADER]
    with pytest.raises(ProblemError, match=r"tox21\.csv must name the columns, but lacks SR-HSE"):
        datasets(write(tmp_path, molecules(250), header))


def test_an_empty_file(root):
    (root / "tox21" / "tox21.csv").write_text("")
    with pytest.raises(ProblemError, match=r"tox21\.csv has no rows"):
        datasets(root)


@pytest.mark.parametrize("samples", [127, 201])
def test_too_few_or_too_many_samples(samples, root):
    with pytest.raises(UsageError, match=r"127 training samples are too few|has 200 training samples, not 201"):
        get("tox21", data_root=root, train_samples=samples).make_loaders(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "nowhere"], "There is no folder nowhere"),
        (["--data-root", "."], "lacks files of tox21: tox21/tox21.csv. Expected is"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tox21", *options, "--device", "cpu", "--out", "run"]) == 2
    assert message in capsys.readouterr().err


# The real data.


@needs_the_real_data
def test_counts_and_rates_of_the_real_data():
    train, test = datasets(REAL)
    assert len(train) + len(test) == 8014 and len(test) == pytest.approx(8014 / 5, rel=0.02)
    with (REAL / "tox21" / "tox21.csv").open() as file:
        rows = list(csv.DictReader(file))
    for task in TASKS:
        target = torch.cat([data.targets[task] for data in (train, test)])
        assert target.nansum() == sum(row[task] == "1" for row in rows)
        assert target.isnan().sum() == sum(row[task] == "" for row in rows)
    codes = [{row.tobytes() for row in data.inputs.numpy()} for data in (train, test)]
    # Of the 7,831 molecules, 58 share all their counts with another, such as a stereoisomer; one may be on either side.
    assert len(codes[0] | codes[1]) == 7831 - 58 and len(codes[0] & codes[1]) < 58


@needs_the_real_data
def test_it_trains_on_the_real_data(tmp_path, capsys):
    words = ["--data-root", str(REAL), "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["train", "tox21", *words]) == 0
    out = capsys.readouterr().out
    scores = {line.split()[0]: float(line.split()[2]) for line in out.splitlines() if " auc " in line}
    assert set(scores) == set(TASKS) and sum(scores.values()) / len(scores) > 0.6
