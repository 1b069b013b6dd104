import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recon.errors import ProblemError, UsageError
from recon.models import PLE, SharedBottom
from recon.problems import descriptions, get
from recon.problems.sets.adult import CATEGORIES, COLUMNS, FEATURES, MARITAL, NUMBERS
from recon_cli.main import main

REAL = Path(__file__).parents[3] / "shared" / "data"

needs_the_real_data = pytest.mark.skipif(
    not (REAL / "adult" / "adult.data").is_file(), reason="needs UCI Adult in ../shared/data"
)

CHOICES = {
    **{column: listed.split() for column, listed in CATEGORIES.items()},
    "marital-status": MARITAL,
    "relationship": ["Wife", "Husband"],
    "income": ["<=50K", ">50K"],
}
RANGES = {"age": 90, "fnlwgt": 10**6, "education-num": 16, "capital-gain": 99999, "capital-loss": 4356}


def people(count, seed):
    random = np.random.RandomState(seed)
    columns = {
        name: random.choice(CHOICES[name], count) if name in CHOICES else random.randint(1, RANGES.get(name, 99), count)
        for name in COLUMNS
    }
    return [[str(columns[name][row]) for name in COLUMNS] for row in range(count)]


def write(root, train=None, test=None):
    """As the archive has them: comma and space, an empty last line; full stops and a remark in the test file."""
    train, test = people(300, 0) if train is None else train, people(40, 1) if test is None else test
    root.mkdir(parents=True, exist_ok=True)
    (root / "adult.data").write_text("".join(f"{', '.join(row)}\n" for row in train) + "\n")
    lines = "".join(f"{', '.join(row)}.\n" for row in test)
    (root / "adult.test").write_text(f"|1x3 Cross validator\n{lines}\n")
    return root


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "adult")
    return tmp_path


def datasets(root, **options):
    return [loader.dataset for loader in get("adult", data_root=root, **options).make_loaders(0)]


def column(rows, name):
    return [row[COLUMNS.index(name)] for row in rows]


# What is read.


@pytest.mark.parametrize("folder", ["adult", "."])
def test_rows_become_numbers_and_one_column_for_each_category(folder, tmp_path):
    write(tmp_path / folder)
    for dataset, rows in zip(datasets(tmp_path), (people(300, 0), people(40, 1)), strict=True):
        inputs = dataset.inputs
        assert inputs.shape == (len(rows), FEATURES) == (len(rows), 94) and inputs.dtype == torch.float32
        start = len(NUMBERS)
        for name, listed in CATEGORIES.items():
            block = inputs[:, start : start + len(listed.split())]
            assert [listed.split()[i] for i in block.argmax(dim=1)] == column(rows, name)
            assert (block.sum(dim=1) == 1).all() and set(block.unique().tolist()) <= {0, 1}
            start += block.shape[1]
        assert start == FEATURES
        for task, name, yes in (("income", "income", ">50K"), ("marital_status", "marital-status", "Never-married")):
            assert dataset.targets[task].tolist() == [float(value == yes) for value in column(rows, name)]


def test_numbers_are_scaled_by_the_training_data_alone(root):
    train, test = datasets(root)
    for index, name in enumerate(NUMBERS):
        values, others = (np.array(column(people(*which), name), float) for which in ((300, 0), (40, 1)))
        for inputs, raw in ((train.inputs, values), (test.inputs, others)):
            np.testing.assert_allclose(inputs[:, index], (raw - values.mean()) / values.std(), rtol=1e-5, atol=1e-6)


def test_the_first_people_only_make_the_scale_too(root, tmp_path):
    some = datasets(root, train_samples=256)[0]
    assert some.inputs.shape == (256, FEATURES)
    numbers = some.inputs[:, : len(NUMBERS)]
    torch.testing.assert_close(numbers.mean(dim=0), torch.zeros(len(NUMBERS)), atol=1e-5, rtol=0)
    torch.testing.assert_close(numbers.std(dim=0, correction=0), torch.ones(len(NUMBERS)))
    same = datasets(write(tmp_path / "short", people(300, 0)[:256]))[0]
    torch.testing.assert_close(some.inputs, same.inputs)


def test_a_number_that_is_the_same_everywhere_stays_finite(tmp_path):
    rows = people(300, 0)
    for row in rows:
        row[COLUMNS.index("capital-gain")] = "7"
    train, _ = datasets(write(tmp_path, rows))
    assert (train.inputs[:, NUMBERS.index("capital-gain")] == 0).all()


@pytest.mark.parametrize("left_out", ["relationship", "fnlwgt", "marital-status", "income"])
def test_neither_an_answer_nor_what_tells_it_is_an_input(left_out, root, tmp_path):
    rows = people(300, 0)
    others = CHOICES.get(left_out, ["1", "2"])
    for row in rows:
        index = COLUMNS.index(left_out)
        row[index] = others[(others.index(row[index]) + 1) % len(others)] if row[index] in others else others[0]
    (train, _), (changed, _) = datasets(root), datasets(write(tmp_path / "changed", rows))
    assert torch.equal(train.inputs, changed.inputs)


def test_the_problem_without_its_data(root):
    problem = get("adult", data_root=str(root))
    assert problem.name == "adult" and problem.description == descriptions()["adult"]
    (root / "adult" / "adult.data").unlink()
    example = problem.example_inputs()
    tasks = dict.fromkeys(problem.task_names, 1)
    for model in (problem.make_model(), PLE(tasks, FEATURES), SharedBottom(tasks, FEATURES)):
        assert {task: output.shape for task, output in model(example).items()} == dict.fromkeys(tasks, (8, 1))


def test_listing_and_making_it_reads_no_torchvision(root):
    code = f"import recon.problems, sys; recon.problems.get('adult', data_root={str(root)!r}).make_model()"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torchvision' not in sys.modules"], check=True)


# Wrong input.


def damaged(place, name, value):
    rows = people(300, 0)
    rows[place][COLUMNS.index(name)] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (damaged(4, "age", "old"), r"adult\.data, line 5: the age is 'old', but must be a whole number"),
        (damaged(0, "capital-gain", "?"), r"line 1: the capital-gain is '\?', but must be a whole number"),
        (damaged(299, "workclass", "Pirate"), r"line 300: the workclass is 'Pirate', but must be one that adult.names"),
        (damaged(2, "race", "?"), r"line 3: the race is '\?'"),
        (damaged(2, "marital-status", "Engaged"), "line 3: the marital-status is 'Engaged', but must be one of Marr"),
        (damaged(2, "income", "50K"), "line 3: the income is '50K', but must be one of <=50K, >50K"),
        ([*people(3, 0), ["39", "Private"]], r"adult\.data, line 4: there must be 15 entries, but there are 2"),
        ([], r"adult\.data has no rows"),
    ],
)
def test_damaged_rows_are_named_by_file_and_line(rows, message, tmp_path):
    with pytest.raises(ProblemError, match=message):
        datasets(write(tmp_path, rows))


def test_lines_are_counted_with_those_that_are_left_out(tmp_path):
    rows = people(40, 1)
    rows[0][COLUMNS.index("sex")] = "Unknown"
    with pytest.raises(ProblemError, match=r"adult\.test, line 2: the sex is 'Unknown', but must be .*: Female, Male"):
        datasets(write(tmp_path, test=rows))


@pytest.mark.parametrize("content", [b"39, \xff\xfe", None])
def test_unreadable_files_are_named(content, root):
    problem, path = get("adult", data_root=root), root / "adult" / "adult.test"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"Cannot read .*adult\.test"):
        problem.make_loaders(0)


def test_missing_files_are_named_with_the_official_source(root):
    (root / "adult" / "adult.test").unlink()
    with pytest.raises(ProblemError, match=r"lacks files of adult: adult/adult.test\. .*archive.ics.uci.edu/dataset/2"):
        get("adult", data_root=root)


@pytest.mark.parametrize("samples", [255, 301])
def test_too_few_or_too_many_samples(samples, root):
    with pytest.raises(UsageError, match=r"255 training samples are too few|has 300 training samples, not 301"):
        get("adult", data_root=root, train_samples=samples).make_loaders(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --data-root DIR"),
        (["--data-root", "nowhere"], "There is no folder nowhere"),
        (["--data-root", "."], "lacks files of adult: adult/adult.data, adult/adult.test"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "adult", *options, "--device", "cpu", "--out", "run"]) == 2
    assert message in capsys.readouterr().err


# The real data.


@needs_the_real_data
def test_counts_and_rates_are_those_of_adult_names():
    train, test = datasets(REAL)
    assert (len(train), len(test)) == (32_561, 16_281)
    rich, single = (
        torch.cat([data.targets[task] for data in (train, test)]).double() for task in ("income", "marital_status")
    )
    assert round(100 * rich.mean().item(), 2) == 23.93  # "Probability for the label '>50K'  : 23.93%"
    text = [(REAL / "adult" / name).read_text() for name in ("adult.data", "adult.test")]
    assert single.sum() == sum(part.count(" Never-married,") for part in text)
    start = len(NUMBERS)
    known = torch.ones(len(rich), dtype=torch.bool)
    for listed in CATEGORIES.values():  # "45222 if instances with unknown values are removed"
        names = listed.split()
        if "?" in names:
            known &= torch.cat([data.inputs[:, start + names.index("?")] for data in (train, test)]) == 0
        start += len(names)
    assert known.sum() == 45_222 and round(100 * rich[known].mean().item(), 2) == 24.78


@needs_the_real_data
def test_it_trains_on_the_real_data(tmp_path, capsys):
    words = ["--data-root", str(REAL), "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["train", "adult", *words]) == 0
    out = capsys.readouterr().out
    scores = {tuple(line.split()[:2]): float(line.split()[2]) for line in out.splitlines() if " auc " in line}
    assert scores["income", "auc"] > 0.8 and scores["marital_status", "auc"] > 0.8
