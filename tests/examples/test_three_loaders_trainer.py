"""The example with three loaders in a Hugging Face Trainer: all tasks meet in all steps, and the map loads."""

import runpy
from pathlib import Path

import pytest

import recon

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

EXAMPLE = Path(__file__).parents[2] / "examples" / "three_loaders_trainer.py"


def test_three_loaders_make_joint_steps_of_a_trainer(tmp_path, capsys):
    example = runpy.run_path(str(EXAMPLE))
    cmap = example["main"](str(tmp_path / "map.json"), "cagrad", epochs=2)
    assert cmap.steps == 16  # of 8 batches, as many as the longest loader has
    met = cmap.observed()["bert.encoder.layer.0.output.dense"]
    assert met == {("topic", "tags"): 16, ("topic", "score"): 16, ("tags", "score"): 16}
    # The pooler serves two of the tasks.
    assert cmap.observed()["bert.pooler.dense"] == {("topic", "tags"): 0, ("topic", "score"): 16, ("tags", "score"): 0}
    assert recon.ConflictMap.load(tmp_path / "map.json").scores() == cmap.scores()
    assert "of 16 joint steps" in capsys.readouterr().out
