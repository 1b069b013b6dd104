"""UCI Adult: what people earn and whether they ever married, from the census of 1994."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from recon.models import MMoE
from recon.problems.files.csv_table import CsvTable, read_csv
from recon.problems.files.roots import open_root, require_files
from recon.problems.loading import Splits, TensorBatches, loaders_of
from recon.problems.options import check_available, check_train_samples
from recon.problems.problem import Problem
from recon.problems.tasks.binary import accuracy, auc, binary_task

DESCRIPTION = "income and marital status of 48,842 people, 2 tasks, rows of 94 numbers, MMoE; --data-root: UCI Adult"

NAME = "adult"
TRAIN, TEST = "adult.data", "adult.test"
BATCH = 256

COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
# As in adult.names, and in its order; unknown where the files have unknown ones.
CATEGORIES = {
    "workclass": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked ?",
    "education": "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th 7th-8th 12th Masters "
    "1st-4th 10th Doctorate 5th-6th Preschool",
    "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners "
    "Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces ?",
    "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "sex": "Female Male",
    "native-country": "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India "
    "Japan Greece South China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland "
    "France Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand "
    "Yugoslavia El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands ?",
}
MARITAL = "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse".split()
FEATURES = len(NUMBERS) + sum(len(listed.split()) for listed in CATEGORIES.values())
# For each task: its column, the values that it may have, and the value that counts as yes.
TASKS = {
    "income": ("income", ["<=50K", ">50K"], ">50K"),
    "marital_status": ("marital-status", MARITAL, "Never-married"),
}

_EXPECTED = (
    f"Expected are {NAME}/{TRAIN} and {NAME}/{TEST}, or both in the folder itself, as they come in the archive of "
    "https://archive.ics.uci.edu/dataset/2/adult."
)


def adult(data_root: str | Path | None = None, train_samples: int | None = None) -> Problem:
    """Whether a person earns more than 50,000 dollars a year (`income`), and never married (`marital_status`).

    The two tasks of Ma et al. ("Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", KDD 2018, section 6.3) and Tang et al. (PLE, RecSys 2020), who pair them on the larger
    Census-Income (KDD) data; here they are asked of UCI Adult (Kohavi, KDD 1996; 32,561 people to train on, 16,281
    to test). The network is MMoE; `PLE` and `SharedBottom` of `recon.models` fit as well.

    The inputs leave out both answers, and also `relationship`: wives and husbands are married, so that it gives most of
    the second answer away. (Public code for the KDD data leaves out the two labels alone and keeps household columns of
    this kind; do not compare with its AUCs near 0.99 for marital status.) They leave out `fnlwgt` too, a weight of the
    survey.

    Inputs are `(N, 94)`, float32: five numbers, with mean 0 and variance 1 over the training data, and one column for
    each category that adult.names lists, `?` included where there are unknown values. Targets are `(N,)`, float32,
    1 for yes. Outputs are logits `(N, 1)`.

    `data_root` holds `adult/adult.data` and `adult/adult.test`, or these files themselves. `train_samples` takes the
    first so many people only.
    """
    root = open_root(NAME, data_root, _EXPECTED)
    check_train_samples(NAME, train_samples, BATCH)
    folder = root if (root / TRAIN).is_file() else root / NAME
    require_files(NAME, root, [folder / TRAIN, folder / TEST], _EXPECTED)

    return Problem(
        name=NAME,
        tasks=[binary_task(name, auc(), accuracy()) for name in TASKS],
        make_model=lambda: MMoE(dict.fromkeys(TASKS, 1), FEATURES),
        make_loaders=loaders_of(lambda: _data(folder, train_samples), BATCH, test_batch_size=1000),
        make_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        make_scheduler=CosineAnnealingLR,
        epochs=20,
        description=DESCRIPTION,
        example_inputs=lambda: torch.zeros(8, FEATURES),
    )


def _data(folder: Path, train_samples: int | None) -> Splits:
    tables = [read_csv(folder / name, COLUMNS, header=False, comment="|") for name in (TRAIN, TEST)]
    check_available(NAME, len(tables[0]), train_samples)
    train, test = (np.concatenate([_numbers(table), _one_hot(table)], axis=1) for table in tables)
    train = train[:train_samples]
    _standardise(train[:, : len(NUMBERS)], test[:, : len(NUMBERS)])
    return _batches(train, tables[0]), _batches(test, tables[1])


def _standardise(train: np.ndarray, test: np.ndarray) -> None:
    """Change both in place, by the mean and the deviation of the first."""
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    for numbers in (train, test):
        numbers -= mean
        numbers /= np.where(deviation > 0, deviation, 1)


def _batches(rows: np.ndarray, table: CsvTable) -> TensorBatches:
    targets = {}
    for task, (column, known, yes) in TASKS.items():
        values = table.columns[column]
        if column == "income":  # in adult.test, a full stop ends each line
            values = np.char.rstrip(values, ".")
        table.require(column, np.isin(values, known), f"one of {', '.join(known)}")
        targets[task] = torch.from_numpy((values == yes)[: len(rows)]).float()
    return TensorBatches(torch.from_numpy(rows).float(), targets)


def _numbers(table: CsvTable) -> np.ndarray:
    for column in NUMBERS:
        table.require(column, np.char.isdecimal(table.columns[column]), "a whole number")
    return np.stack([table.columns[column].astype(np.float64) for column in NUMBERS], axis=1)


def _one_hot(table: CsvTable) -> np.ndarray:
    """`(N, columns)`: one column for each category."""
    blocks = []
    for column, listed in CATEGORIES.items():
        known = np.array(listed.split())
        block = table.columns[column][:, None] == known
        table.require(column, block.any(axis=1), f"one that adult.names lists: {', '.join(known)}")
        blocks.append(block)
    return np.concatenate(blocks, axis=1).astype(np.float64)
