"""ESMM with sparse embeddings: profiled, branched, trained; better than chance on impressions that it has not seen."""

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "esmm_sparse.py"


def test_it_branches_and_learns(capsys):
    spec = importlib.util.spec_from_file_location("esmm_sparse", EXAMPLE)
    esmm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(esmm)
    results = esmm.main(impressions=20_000, epochs=2)
    assert "branched: " in capsys.readouterr().out
    assert all(area > 0.6 for by_task in results.values() for area in by_task.values())
    model, (ids, targets) = esmm.ESMM(), next(iter(esmm.click_log(300, seed=2)))
    outputs = model(ids)
    assert (outputs["click and conversion"] <= outputs["click"]).all()  # a product of probabilities
    assert (targets["click and conversion"] <= targets["click"]).all()
