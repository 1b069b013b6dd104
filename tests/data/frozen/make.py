"""Wrote the files of this folder, with the code of commit 59ee150; they are not made again.

    python -m tests.data.frozen.make

Everything that recon writes is here once, of networks of some hundred numbers: a map, models, runs, a bench, and the
checkpoints of interrupted trainings, compressed. `expected.json`, `profile.json` and the `*.safetensors` beside it hold
what must come out. Pictures, logs and locks, which nothing reads, are left out. `map_with_floor.json`, a map of version
3, is of later: `recon profile tiny.py:problem --epochs 3 --floor 3`.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file

import recon
from recon_cli.main import main
from tests.data.frozen import tiny

HERE = Path(__file__).parent


def command(line: str, code: int = 0) -> None:
    """Run a command line, which must end with this code."""
    assert main([*line.split(), "--device", "cpu"]) == code


def interrupted(work):
    """Run something that Ctrl-C ends after its ninth optimizer step."""
    steps = count(1)
    with suppress(KeyboardInterrupt):
        return work(lambda: signal.raise_signal(signal.SIGINT) if next(steps) == tiny.THIRD else None)


def interrupted_command(line: str) -> None:
    """Run a training of the command line that Ctrl-C ends."""
    step = torch.optim.SGD.step

    def work(stop):
        def stopping(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            stop()
            return result

        torch.optim.SGD.step = stopping
        command(line, 1)

    interrupted(work)
    torch.optim.SGD.step = step


def outputs(model: torch.nn.Module) -> dict[str, list[float]]:
    """In evaluation mode, on eight inputs."""
    return {task: output.tolist() for task, output in model.eval()(tiny.inputs(8)).items()}


def make() -> None:
    """Write everything."""
    command("profile tiny.py:problem --epochs 3 --out map.json")
    command("convert tiny.py:problem --map map.json --top-k 2 --out branched")
    command("train tiny.py:problem --epochs 2 --out runs/joint")
    command("train tiny.py:problem --epochs 2 --method pcgrad --model branched --out runs/pcgrad")
    command("train tiny.py:problem --epochs 2 --single-task --out runs/single")
    command("train tiny.py:problem --method uw --model branched --out runs/whole")
    interrupted_command("train tiny.py:problem --method uw --model branched --out runs/interrupted")
    sizes = "--epochs 2 --profile-epochs 1 --seeds 1 --workers 1"
    command(f"bench tiny.py:problem --methods joint --controls none --top-k 2 {sizes} --out bench")

    expected = {"scores": recon.ConflictMap.load("map.json").scores(-0.1)}
    for name, model in (("saved", tiny.branched()), ("rotated", tiny.rotated())):
        recon.save(model, name)
        expected[name] = outputs(model)
    for kind in ("joint", "gradnorm", "profile"):
        interrupted(lambda stop, kind=kind: tiny.train(kind, Path(f"{kind}.checkpoint"), stop=stop))
        model, found = tiny.train(kind)
        save_file(model.state_dict(), f"{kind}.safetensors")
        if kind == "profile":
            found.save("profile.json")
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def clean() -> None:
    """Remove what nothing reads, and compress the checkpoints."""
    for path in list(HERE.rglob("*")):
        if path.is_file() and (path.suffix in (".png", ".log") or path.name.startswith(".")):
            path.unlink()
        elif path.suffix == ".checkpoint":
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()
    shutil.move("runs/whole/weights.safetensors", "interrupted.safetensors")
    shutil.rmtree("runs/whole")
    for run in ("pcgrad", "single"):
        for path in list(HERE.glob(f"runs/{run}/**/best")):
            shutil.rmtree(path)


if __name__ == "__main__":
    os.chdir(HERE)
    make()
    clean()
