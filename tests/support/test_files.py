"""Whatever fails while files are written, the old ones stay or the new ones are there: never a part of each."""

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import recon
from recon.errors import UsageError, WriteError
from recon.support.files import locks
from recon.support.files import whole as files
from recon.support.files.folders import finish_replacing, replacing
from recon.support.files.whole import remove_partial, write_atomically, write_from, write_text, written_alone
from recon.training.recorder import Recorder
from recon_cli.main import main

CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "chmod")
LOSSES = {"a": nn.functional.mse_loss, "b": nn.functional.l1_loss}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    def forward(self, x):
        x = self.body(x).relu()
        return {task: head(x) for task, head in self.heads.items()}


def branched(value):
    model = recon.convert(Net(), recon.BranchPlan.per_task(["body"], tasks=("a", "b")), torch.zeros(2, 3))
    return filled(model, value)


def filled(model, value):
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


class Killed(BaseException):
    """What the process would not survive: nothing of ours may run after it."""


class Faults:
    """Counts the calls to the operating system, and lets the n-th one fail; after a kill, none does anything."""

    def __init__(self, monkeypatch, at=0, error=None):
        self.count, self.at, self.error, self.dead = 0, at, error, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, call):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.dead or (self.count == self.at and self.error is None):
                self.dead = True
                raise Killed
            if self.count == self.at:
                raise self.error
            return call(*args, **kwargs)

        return wrapped


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


OLD = {"run.json": b"old run", "plan.json": b"old plan", "weights": b"old", "best/run.json": b"old best", "mine": b"my"}
NEW = {"run.json": b"new run", "weights": b"new", "mine": b"my"}


def old_folder(path):
    for name, content in OLD.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def replace_all(folder):
    with replacing(folder, ("run.json", "plan.json", "weights", "best/run.json")) as new:
        write_text(new / "run.json", "new run")
        write_text(new / "weights", "new")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None], ids=["full disk", "killed"])
def test_a_folder_s_files_are_replaced_together_whatever_call_fails(tmp_path, monkeypatch, error):
    """The n-th call fails, for every n; then the next one looks there."""
    with monkeypatch.context() as patch:
        total = Faults(patch)
        replace_all(old_folder(tmp_path / "counted"))
        assert contents(tmp_path / "counted") == NEW
    assert total.count > 10
    found = []
    for n in range(1, total.count + 1):
        folder = old_folder(tmp_path / str(n))
        with monkeypatch.context() as patch:
            Faults(patch, n, error)
            try:
                replace_all(folder)
            except WriteError:
                assert error is not None
            except Killed:
                assert error is None
        finish_replacing(folder)
        names = {name: content for name, content in contents(folder).items() if ".partial" not in name}
        assert names in (OLD, NEW), n
        found.append(names == NEW)
        # The next save sweeps what was left, and needs no one's help.
        replace_all(folder)
        assert contents(folder) == NEW and not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert True in found and False in found
    if error is None:  # one call is the change
        assert found == sorted(found)


def test_a_save_that_was_killed_while_it_moved_its_files_is_finished_by_any_reader(tmp_path, monkeypatch):
    recon.save(filled(Net(), 1.0), tmp_path)
    moved = []

    def killed(source, target, replace=os.replace):
        if Path(source).parent.name == ".saved" and moved:
            raise Killed
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target, do=os.replace: do(source, target))
        patch.setattr("recon.support.files.folders.os.replace", killed)
        with pytest.raises(Killed):
            recon.save(branched(2.0), tmp_path)
    assert (tmp_path / ".saved").exists()
    assert recon.load(tmp_path, Net()).branch_plan.layers.keys() == {"body"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "weights.safetensors"]


@pytest.mark.parametrize(
    "first, second",
    [(branched, lambda v: filled(Net(), v)), (lambda v: filled(Net(), v), branched)],
    ids=["plain", "branched"],
)
def test_a_model_over_another_one_is_whole_or_the_old_one_stays(tmp_path, monkeypatch, first, second):
    recon.save(first(1.0), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)

    def full(*args, **kwargs):
        from safetensors import SafetensorError

        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("recon.support.files.weights.save_model", full)
        with pytest.raises(WriteError, match=r"No space left on device\. Free some space"):
            recon.save(second(2.0), tmp_path)
    assert contents(tmp_path) == before
    recon.save(second(2.0), tmp_path)
    assert contents(tmp_path)["notes.txt"] == b"mine"
    loaded = recon.load(tmp_path, Net())
    assert all(bool((parameter == 2.0).all()) for parameter in loaded.parameters())


def test_a_folder_in_the_way_is_found_before_anything_changes(tmp_path):
    folder = old_folder(tmp_path / "run")
    (folder / "weights").unlink()
    (folder / "weights").mkdir()
    before = contents(folder)
    with pytest.raises(UsageError, match="weights: it is a folder"):
        replace_all(folder)
    assert contents(folder) == before


def test_a_full_disk_keeps_the_old_file_and_is_no_wrong_usage(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: write_text(path, "new"), lambda: write_from(tmp_path / "lines", 0, "new")):
        with pytest.raises(WriteError, match="Free some space") as caught:
            write()
        assert not isinstance(caught.value, UsageError)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def odd(tmp_path):
    """Names that are no regular files: a pipe and a socket, and as root a device like /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    made = {"pipe": "a pipe", "folder": "a folder"}
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's name is short
        listener.bind("socket")
        os.chdir(here)
        made["socket"] = "a socket"
        if os.geteuid() == 0:
            os.mknod(tmp_path / "device", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            made["device"] = "a device"
        yield {tmp_path / name: kind for name, kind in made.items()}


def test_what_is_no_regular_file_is_never_replaced(odd, tmp_path, capsys, monkeypatch):
    from recon.support.pictures import save_picture

    monkeypatch.chdir(tmp_path)
    model = Net()
    batches = [(torch.randn(2, 3), {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)})] * 2
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cmap = recon.profile(model, batches, LOSSES, optimizer=optimizer, epochs=1)
    for path, kind in odd.items():
        before = path.lstat()
        writers = [
            lambda path=path: write_text(path, "x"),
            lambda path=path: write_from(path, 0, "x"),
            lambda path=path: cmap.save(path),
            lambda path=path: save_picture(None, path),
            lambda path=path: recon.train(model, batches, LOSSES, optimizer=optimizer, epochs=1, checkpoint=path),
            lambda path=path: recon.train(
                model, batches, LOSSES, optimizer=optimizer, epochs=1, recorder=Recorder(path)
            ),
        ]
        for write in writers:
            with pytest.raises(UsageError):
                write()
        for line in (
            f"profile digits --out {path}",
            f"map import x.json --threshold -0.1 --out {path}",
            f"map merge a b --out {path}",
        ):
            assert main(line.split()) == 2
            assert f"it is {kind}" in capsys.readouterr().err
        if kind != "a folder":
            for line in (f"train digits --out {path}", f"convert digits --layers x --out {path}", f"demo --out {path}"):
                assert main(line.split()) == 2
                assert f"it is {kind}" in capsys.readouterr().err
            with pytest.raises(UsageError):
                recon.save(model, path)
        after = path.lstat()
        assert (stat.S_IFMT(before.st_mode), before.st_ino) == (stat.S_IFMT(after.st_mode), after.st_ino)
    assert not [path.name for path in tmp_path.glob(".*")]


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "map.json").write_text("old")
    (tmp_path / "link").symlink_to("far/map.json")
    (tmp_path / "link to link").symlink_to(tmp_path / "link")
    (tmp_path / "folder").symlink_to("far/deep", target_is_directory=True)
    write_text(tmp_path / "link to link", "new")
    assert (tmp_path / "far" / "map.json").read_text() == "new"
    assert write_from(tmp_path / "link", 1, "o") == 2
    assert (tmp_path / "far" / "map.json").read_text() == "no"
    recon.save(Net(), tmp_path / "folder")
    recon.save(Net(), tmp_path / "folder")
    assert [path.name for path in (tmp_path / "far" / "deep").iterdir()] == ["weights.safetensors"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder").is_symlink()


@pytest.mark.parametrize(
    "verb", ["train digits", "profile digits", "convert digits --layers x", "demo", "bench digits"]
)
def test_names_that_cannot_be_are_wrong_usage(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for out, words in {
        "": "it is empty",
        " ": "it is empty",
        "a\0b": "NUL",
        "broken": "symbolic link to nowhere",
        "loop": "Cannot write",
        "x" * 300: "name too long",
        "a/" + "x" * 300: "name too long",
    }.items():
        assert main([*verb.split(), "--out", out]) == 2, out
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error, out
    assert sorted(os.listdir(tmp_path)) == ["broken", "loop"]


@pytest.mark.parametrize(
    "line",
    [
        "map show",
        "map merge --out b a",
        "map compare a",
        "compare",
        "evaluate digits --model",
        "train digits --out run --model",
        "convert digits --out x --top-k 1 --map",
        "convert digits --out x --like",
        "map show map.json --plot",
        "plan digits --layers x --picture",
        "profile digits --out map.json --data-root",
    ],
)
def test_an_empty_name_is_a_mistake_in_every_option(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), ""]) == 2
    assert "it is empty" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_name_of_a_folder_is_none_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "digits", "--out", "maps/"]) == 2
    assert "names a folder" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path, capsys):
    (tmp_path / "closed").mkdir(mode=0o500)
    for out in ("closed/new", "closed"):
        assert main(["train", "digits", "--out", str(tmp_path / out)]) == 2
        assert "Permission denied" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "map.json"
    left = [tmp_path / f".map.json.{name}.partial" for name in ("abcdefgh", "_1234567")]
    others = [tmp_path / name for name in (".map.json.checkpoint.abcdefgh.partial", ".my.partial", "map.json.partial")]
    for file in left + others:
        file.write_text("")

    def write(temporary):
        temporary.write_text("outer")
        write_text(path, "inner")
        assert temporary.exists()

    write_atomically(path, write)
    assert path.read_text() == "outer"
    assert not any(file.exists() for file in left) and all(file.exists() for file in others)
    left[0].write_text("")
    remove_partial(path)
    assert not left[0].exists()


WRITER = """
import sys
from recon.support.files.whole import written_alone
with written_alone(sys.argv[1]) as killed:
    print("writing", killed, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(locks.fcntl is None, reason="no locks here")
def test_a_second_process_is_told_who_writes_until_that_one_is_killed(tmp_path, capsys):
    path = tmp_path / "map.json"
    argv = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing None\n"
        with pytest.raises(UsageError, match=f"is being written by process {process.pid} on "), written_alone(path):
            pass
        assert main(["profile", "digits", "--out", str(path)]) == 2
        assert f"process {process.pid}" in capsys.readouterr().err
        process.kill()
    with written_alone(path) as killed:
        assert killed is not None
    with written_alone(path) as killed:
        assert killed is None
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(locks.fcntl is None, reason="no locks here")
def test_a_training_s_checkpoint_is_one_training_s(tmp_path):
    model, path = Net(), tmp_path / "run.checkpoint"
    batches = [(torch.randn(2, 3), {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)})]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with written_alone(path), pytest.raises(UsageError, match="is being written by process"):
        recon.train(model, batches, LOSSES, optimizer=optimizer, epochs=1, checkpoint=path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_loader_s_workers_do_not_keep_a_killed_process_s_lock(tmp_path):
    """A process that is forked while a file is locked closes the lock's handle."""
    if not hasattr(os, "fork") or locks.fcntl is None:
        pytest.skip("no forks or no locks here")
    with written_alone(tmp_path / "map.json"):
        (handle,) = locks._handles
        child = os.fork()
        if child == 0:
            try:
                os.fstat(handle)
            except OSError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_without_locks_everything_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with written_alone(tmp_path / "map.json") as killed:
        write_text(tmp_path / "map.json", "text")
    recon.save(Net(), tmp_path / "model")
    assert killed is None and files.target_of(tmp_path / "map.json").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["map.json", "model"]
