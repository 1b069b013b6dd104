"""Files that others may have made to do harm: no code in them runs, none is believed, and none fills the memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import recon
from recon.branching.saving import PLAN_FILE
from recon.errors import CheckpointError, MapFileError, ProblemError, UsageError
from recon.experiments.bench.bench import RESULTS_FILE
from recon.experiments.run import RUN_FILE, Run
from recon.experiments.training.run_folder import METRICS_FILE
from recon.maps.conflict_map import ConflictMap
from recon.maps.published import read_published
from recon.models import SmallResNet
from recon.problems.files import celeba_files, npy_folders
from recon.problems.files.csv_table import read_csv
from recon.problems.files.idx import read_split
from recon.problems.files.images import read_image
from recon.problems.files.pareto_mtl import read_pickle
from recon.problems.files.pascal_mat import read_human_parts, read_label_map
from recon.problems.sets import nyuv2
from recon.support.files.weights import WEIGHTS_FILE, read_state_dict
from recon.training.checkpoint_file import read_training
from recon.training.recorder import read_records


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def pickled(trap):
    return pickle.dumps(trap)


def by_torch(trap):
    file = io.BytesIO()
    torch.save({"cos": {"layer": trap}, "state_dict": {"weight": torch.ones(1), "more": trap}}, file)
    return file.getvalue()


def by_old_torch(trap):
    file = io.BytesIO()
    torch.save({"weight": torch.ones(1), "more": trap}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def by_numpy(trap):
    file = io.BytesIO()
    np.save(file, np.array([trap, trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def packed_by_numpy(trap):
    file = io.BytesIO()
    names = ("image", "depth_m", "seg13", "train", "test")
    np.savez(file, **dict.fromkeys(names, np.array([trap], dtype=object)))
    return file.getvalue()


KINDS = {
    "pickle": pickled,
    "torch": by_torch,
    "old torch": by_old_torch,
    "npy": by_numpy,
    "npz": packed_by_numpy,
}
READERS = {
    "weights.pt": (read_state_dict, CheckpointError),
    "weights.safetensors": (read_state_dict, CheckpointError),
    "training.checkpoint": (read_training, CheckpointError),
    "log.pt": (lambda path: read_published(path, -0.1), MapFileError),
    "scores.json": (lambda path: read_published(path, -0.1), MapFileError),
    "map.json": (ConflictMap.load, MapFileError),
    "run.json": (Run.load, CheckpointError),
    "metrics.jsonl": (read_records, CheckpointError),
    "digits.pickle": (lambda path: read_pickle(path, 36, 10), ProblemError),
    "0.npy": (lambda path: npy_folders._read(path, npy_folders.image), ProblemError),
    "packed.npz": (lambda path: nyuv2._read_packed(path, None), ProblemError),
    "classes.mat": (read_label_map, ProblemError),
    "parts.mat": (read_human_parts, ProblemError),
    "photo.jpg": (read_image, ProblemError),
    "table.csv": (lambda path: read_csv(path, ("a", "b"), header=True), ProblemError),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_no_code_in_a_file_runs(tmp_path, reader, kind):
    read, error = READERS[reader]
    path, marker = tmp_path / reader, tmp_path / "marker"
    path.write_bytes(KINDS[kind](Trap(marker)))
    with pytest.raises(error) as caught:
        read(path)
    assert str(path) in str(caught.value) or "Refused to unpickle" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_in_a_file_of_decoded_faces_runs(tmp_path, kind):
    (tmp_path / "faces.npy").write_bytes(KINDS[kind](Trap(tmp_path / "marker")))
    assert celeba_files._kept(tmp_path / "faces.npy", 2) is None  # it is decoded again
    assert not (tmp_path / "marker").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickled(Trap(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


# What small files unpack to.


def test_an_idx_file_is_read_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("recon.problems.files.idx._MOST_BYTES", 10_000)
    labels = struct.pack(">II", 2049, 10**6) + bytes(10**6)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 1, 2, 2) + bytes(4))
    with pytest.raises(ProblemError, match=r"train-labels-idx1-ubyte.gz .* has more than 10000"):
        read_split(tmp_path, "train")


def test_a_mat_file_is_unpacked_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("recon.problems.files.pascal_mat._MOST_BYTES", 10_000)
    packed = zlib.compress(bytes(10**6))
    path = tmp_path / "classes.mat"
    path.write_bytes(bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(ProblemError, match=f"{path}: .*unpacks to more than 10000 bytes"):
        read_label_map(path)


def test_packed_arrays_are_unpacked_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("recon.problems.sets.nyuv2._MOST_BYTES", 10_000)
    np.savez_compressed(tmp_path / "packed.npz", image=np.zeros(10**6, np.uint8))
    with pytest.raises(ProblemError, match=r"packed.npz: unpacked, it has \d+ bytes"):
        nyuv2._read_packed(tmp_path / "packed.npz", None)


def test_an_array_is_as_large_as_its_file(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**10)})
    (tmp_path / "0.npy").write_bytes(header.getvalue() + bytes(80))
    with pytest.raises(ProblemError, match=r"0.npy"):
        npy_folders._read(tmp_path / "0.npy", npy_folders.image)


def test_an_image_has_bounded_pixels(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # twice as many are an error
    with pytest.raises(ProblemError, match=r"photo.png: .*decompression bomb"):
        read_image(tmp_path / "photo.png")


def test_an_entry_of_a_table_has_bounded_length(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n" + "x" * 5000 + ",2\n")
    with pytest.raises(ProblemError, match=r"table.csv, line 3: an entry has more than 4096 characters"):
        read_csv(tmp_path / "table.csv", ("a", "b"), header=True)


def test_a_compressed_archive_of_tensors_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    read_state_dict(tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match=r"packed.pt .* is a compressed archive"):
        read_state_dict(tmp_path / "packed.pt")


def test_a_flipped_bit_in_a_checkpoint_from_elsewhere_is_found(tmp_path):
    torch.save({"weight": torch.arange(1000.0)}, tmp_path / "init.pt")
    content = (tmp_path / "init.pt").read_bytes()
    place = content.index(torch.arange(500.0, 510.0).numpy().tobytes())
    (tmp_path / "init.pt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"init.pt .* has another checksum"):
        read_state_dict(tmp_path / "init.pt")


# Received folders, on the command line.


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("received")
    (folder / "trap.py").write_text(f"import os\nos.mkdir({str(folder / 'marker')!r})\ndef make(): return None\n")
    return folder


def received(folder, **fields):
    recon.save(SmallResNet({"top_left": 10, "bottom_right": 10}), folder)
    tasks = ("top_left", "bottom_right")
    Run("digits", "joint", tasks, "joint", results={t: {"accuracy": 0.5} for t in tasks}, finished=True).save(folder)
    document = json.loads((folder / RUN_FILE).read_text())
    directions = {task: {"accuracy": True} for task in tasks}
    (folder / RUN_FILE).write_text(json.dumps({**document, "higher_is_better": directions, **fields}))
    return folder


CALLED = {
    "file": "trap.py:make",
    "absolute file": "{files}/trap.py:make",
    "module": "trap:make",
    "library": "os:abort",
    "dotted": "os.path:abspath",
    "no network": "importlib",
    "private": "_HOME",
    "dunder": "__getattr__",
    "terminal": "\x1b[31m:abort",
    "shell": "a.py; rm -rf ~:make",
}
VERBS = ("evaluate digits --model {model}", "train digits --epochs 1 --model {model} --out new")


@pytest.mark.parametrize("verb", VERBS, ids=["evaluate", "train"])
@pytest.mark.parametrize("called", CALLED)
def test_a_record_imports_nothing(files, command, called, verb, tmp_path):
    backbone = CALLED[called].format(files=files)
    folder = received(tmp_path / "model", backbone=backbone)
    code, out, err = command(verb.format(model=folder))
    assert (code, out) == (2, "") and str(folder) in err and "Traceback" not in err
    assert "\x1b" not in err
    assert not (files / "marker").exists() and not (files / "new").exists()
    if called == "shell":  # what is there to copy is one word to a shell
        assert "--backbone 'a.py; rm -rf ~:make'" in err


def test_comparing_imports_nothing(files, ask, tmp_path):
    folder = received(tmp_path / "model", backbone="trap.py:make", method="trap.py:make", problem="trap.py:make")
    assert ask(f"compare {folder}")["problem"] == "trap.py:make"
    assert not (files / "marker").exists()


BYTES = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"format":' * 100_000,
    "no utf-8": b'{"format": "\xff\xfe"}',
    "nan": b'{"format": NaN}',
    "twice": b'{"format": "recon run", "format": "recon run"}',
}


@pytest.mark.parametrize("content", BYTES)
@pytest.mark.parametrize("name", [RUN_FILE, PLAN_FILE, METRICS_FILE, RESULTS_FILE])
def test_a_damaged_document_is_named(files, command, tmp_path, name, content):
    folder = tmp_path / "folder"
    if name == PLAN_FILE:
        model = SmallResNet({"top_left": 10, "bottom_right": 10})
        plan = recon.BranchPlan.per_task(["stem.conv"], ("top_left", "bottom_right"))
        recon.save(recon.convert(model, plan, torch.zeros(2, 1, 12, 12)), folder)
    else:
        folder.mkdir()
    (folder / name).write_bytes(BYTES[content])
    if name == METRICS_FILE:
        with pytest.raises(CheckpointError, match=f"{folder / name}(, line 1)?: "):
            read_records(folder / name)
        return
    verb = "bench digits --out" if name == RESULTS_FILE else "evaluate digits --model"
    code, out, err = command(f"{verb} {folder}")
    assert (code, out) == (2, "") and str(folder / name) in err and "Traceback" not in err


def test_a_mode_that_does_not_exist_is_not_evaluated(files, command, tmp_path):
    from safetensors.torch import load_file, save_file

    model = SmallResNet({"top_left": 10, "bottom_right": 10})
    plan = recon.BranchPlan.per_task(["stem.conv"], ("top_left", "bottom_right"))
    recon.save(recon.convert(model, plan, torch.zeros(2, 1, 12, 12)), tmp_path)
    text = (tmp_path / PLAN_FILE).read_text().replace('"fan"', '"evil"')
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file(weights, tmp_path / WEIGHTS_FILE, metadata={"plan": text})
    (tmp_path / PLAN_FILE).write_text(text)
    code, _, err = command(f"evaluate digits --model {tmp_path}")
    assert code == 2 and f"{tmp_path / PLAN_FILE}: field 'mode': mode is 'evil'" in err
    with pytest.raises(UsageError, match=f"{tmp_path / PLAN_FILE}: field 'mode': mode is 'evil'"):
        recon.load(tmp_path, model)
