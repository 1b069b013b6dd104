"""The example with Hugging Face Accelerate, and that its loop trains as Accelerate's own does."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import recon
from recon.maps.conflict_map import ConflictMap
from tests.profiling.test_profiler_around import losses_of, net
from tests.profiling.test_profiler_zoo import assert_states_close

accelerate = pytest.importorskip("accelerate")

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_profile.py"


class WithScaler(accelerate.Accelerator):
    """What `mixed_precision="fp16"` brings on a GPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.fixture(autouse=True)
def no_state_left():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("precision", [(), ("bf16",)], ids=["", "bf16"])
def test_the_example(example, precision, tmp_path, capsys):
    model = example["main"](str(tmp_path / "map.json"), *precision)
    cmap = ConflictMap.load(tmp_path / "map.json")
    assert cmap.made_by["mixed_precision"] == (precision or ("no",))[0]
    assert (cmap.tasks, cmap.skipped) == (("digit", "slant"), 0)
    assert cmap.steps == 3 * 23  # batches of 64 of 1437 digits
    assert [layer.name for layer in cmap.layers] == ["conv1", "bn1", "conv2", "bn2"]
    assert all(layer.histogram.sum() == cmap.steps for layer in cmap.layers)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == cmap.ranking()
    assert [int(line.split()[3]) for line in lines] == sorted(cmap.scores().values(), reverse=True)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scaler", [False, True])
def test_the_model_ends_as_accelerates_own_backward_would_leave_it(example, scaler):
    models = []
    for profiled in (False, True):
        accelerator = (WithScaler if scaler else accelerate.Accelerator)(gradient_accumulation_steps=3)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
        generator = torch.Generator().manual_seed(0)
        loader = DataLoader(torch.randn(32, 6, generator=generator, dtype=torch.float64), batch_size=4)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        profiler = recon.Profiler(model)
        for x in loader:
            with accelerator.accumulate(model):
                losses = losses_of(model, x)
                if profiled:
                    profiler.backward({t: example["scaled"](loss, accelerator) for t, loss in losses.items()})
                else:
                    accelerator.backward(sum(losses.values()))
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        models.append(model)
    assert not torch.equal(models[0].first.weight, net().first.weight)
    assert_states_close(models[1], models[0], tolerance=1e-11)
    assert profiler.conflict_map().steps == 8
