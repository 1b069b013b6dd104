"""The example of alternating tasks runs, and its tasks meet in every step."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "alternating_tasks.py"


def test_tasks_that_alternate_meet_in_every_joint_step(capsys):
    example = runpy.run_path(str(EXAMPLE))
    _, cmap = example["train"]("cagrad", epochs=1)
    assert cmap.steps == 29
    assert {layer for layer, pairs in cmap.observed().items() if pairs["odd", "large"] == 29} == {"body.1", "body.3"}
    example["main"]()
    assert "of 58 joint steps" in capsys.readouterr().out
