"""The code in the README and in the guides runs as it is written."""

import re

import pytest
import torch

import recon
from recon.methods import registry
from recon_cli import main as command_line
from tests.docs.pages import PAGES, ROOT, blocks, command_lines, with_blocks

SMALL = ["--train-samples", "256"]
QUICK = {"profile": [*SMALL, "--epochs", "1"], "train": [*SMALL, "--epochs", "1"], "plan": SMALL, "convert": SMALL}

LEAVES = {
    "docs/guides/profile.md": ["map.json"],
    "docs/guides/branch.md": ["branched/plan.json", "branched/weights.safetensors"],
    "docs/guides/train.md": ["metrics.jsonl", "run.checkpoint"],
    "docs/guides/bench.md": ["runs/joint/run.json"],
}
"""Files that the code of a page writes."""


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """Pages write files, and register methods."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    torch.manual_seed(0)
    return tmp_path


def run(page, change=lambda code: code):
    """Runs the Python of a page, all blocks in one namespace; errors show the line in the page."""
    namespace = {"__name__": "page"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + change(code), ROOT / page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", with_blocks("python"))
def test_the_python_of_a_page_runs(page, in_a_folder):
    run(page)
    assert all((in_a_folder / name).exists() for name in LEAVES.get(page, ()))


def test_the_readme_leaves_a_branched_model_that_loads(in_a_folder):
    namespace = run("README.md")
    assert next(iter(namespace["plan"].layers)) in ("body.0", "body.1")
    assert (in_a_folder / "branched" / "weights.safetensors").exists()
    x, branched, again = (namespace[name] for name in ("x", "branched", "again"))
    assert all(torch.equal(again.eval()(x)[task], output) for task, output in branched.eval()(x).items())


@pytest.mark.parametrize("method", ["uw", "dwa", "famo", "rotograd", "excessmtl", "imtl-l+pcgrad"])
def test_the_loop_of_your_own_serves_every_method(method, in_a_folder):
    page = "docs/guides/own_loop.md"
    assert PAGES[page].count('get("uw")') == 1
    namespace = {}
    code = [code for _, code in blocks(page, "python") if "losses_of(x, targets)" in code or 'get("uw")' in code]
    for part in code:
        exec(part.replace('get("uw")', f'get("{method}")').replace("range(2)", "range(3)"), namespace)
    if method != "excessmtl":  # a weight has moved, if only from the third epoch on
        losses = namespace["losses_of"](*next(iter(namespace["train"])))
        weights = recon.backward(losses, namespace["model"], namespace["method"])
        assert all(abs(weight - 1) > 1e-6 for weight in weights.values())


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_the_command_lines_of_a_page_are_understood(page):
    for line, code in blocks(page, "sh"):
        for words in command_lines(code):
            if "recon_cli" in words:  # torchrun ... -m recon_cli
                words = ["recon", *words[words.index("recon_cli") + 1 :]]
            if words[0] == "recon":
                assert command_line._parse(words[1:]) is not None, f"{page}:{line}"
            elif words[0] == "make":
                assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{page}:{line}"
            else:
                files = [word for word in words if word.startswith(("tests/", "benchmarks/", "examples/"))]
                assert files and all((ROOT / file).exists() for file in files), f"{page}:{line}"


@pytest.mark.parametrize("page", [page for page in with_blocks("sh") if "\n$ recon" in PAGES[page]])
def test_what_a_command_prints_is_what_the_page_shows(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for _, code in blocks(page, "sh"):
        for shown in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
            command, *output = shown.splitlines()
            (words,) = command_lines(command)
            assert command_line.main(words[1:]) == 0
            printed = capsys.readouterr().out
            squeezed = " ".join(printed.split())
            for line in output:
                assert line == "..." or " ".join(line.split()) in squeezed, (command, line, printed)


def test_the_commands_of_the_first_page_run_one_after_the_other(in_a_folder, capsys):
    ((_, code),) = blocks("docs/index.md", "sh")
    for words in command_lines(code):
        assert command_line.main([*words[1:], *QUICK.get(words[1], [])]) == 0, (words, capsys.readouterr().err)


@pytest.mark.parametrize("line", ["problems", "methods", "map show artifacts/digits-small-resnet.json --top-k 8"])
def test_commands_that_only_look_run(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert command_line.main(line.split()) == 0 and capsys.readouterr().out
