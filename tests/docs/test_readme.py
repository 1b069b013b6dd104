import re
from pathlib import Path

import pytest

import recon
from recon_cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, loop = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace = {}
    exec(first, namespace)
    assert next(iter(namespace["plan"].layers)) in ("body.0", "body.1")
    assert (tmp_path / "branched" / "weights.safetensors").exists() and (tmp_path / "map.json").exists()
    net = namespace["Net"]()
    net.load_state_dict(namespace["plain"].state_dict())
    # The loop of one's own, on the same models.
    x, targets = namespace["loader"][0]
    for name in ("model", "branched"):
        out = namespace[name](x)
        losses = [namespace["losses"][task](out[task], targets[task]) for task in out]
        part = loop.split("\n\n")[name == "branched"]
        exec(part, namespace | {"loss_a": losses[0], "loss_b": losses[1]})
        assert all(p.grad is not None for p in namespace[name].parameters())


def test_the_python_example_of_the_page_on_training_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    namespace = {}
    exec(example.replace("epochs=2", "epochs=1"), namespace)
    assert namespace["history"].epochs[0].results["top_left"]["accuracy"] > 0.1
    assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "run.checkpoint").exists()


@pytest.mark.parametrize("method", ["uw", "dwa", "famo", "rotograd", "excessmtl", "imtl-l+pcgrad"])
def test_the_loop_of_ones_own_serves_every_method(method):
    loop, _ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    assert loop.count('get("uw")') == 1
    namespace = {}
    exec(loop.replace('get("uw")', f'get("{method}")').replace("range(2)", "range(3)"), namespace)
    if method != "excessmtl":  # a weight has moved, if only from the third epoch on
        losses = namespace["losses_of"](*next(iter(namespace["train"])))
        weights = recon.backward(losses, namespace["model"], namespace["method"])
        assert all(abs(weight - 1) > 1e-6 for weight in weights.values())


def test_every_verb_is_in_the_readme():
    for verb in VERBS:
        assert re.search(rf"\b(recon|make) {verb}\b", README), verb


def test_the_methods_table_is_that_of_the_registry(capsys):
    """After a change: `recon methods --markdown` prints the new one."""
    assert main(["methods", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert table in README
    for name in recon.methods.names():
        entry = recon.methods.entry(name)
        (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert all(part in line for part in (entry.title, entry.family, entry.scale, entry.paper, *entry.options))


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_point_at_files(link):
    assert (ROOT / link).exists()
