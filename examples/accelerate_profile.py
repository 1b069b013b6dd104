"""Profile in a training loop of your own: here one of Hugging Face Accelerate.

Run it from the folder above, with `pip install accelerate`:

    python examples/accelerate_profile.py map.json
    python examples/accelerate_profile.py map.json bf16
    accelerate launch examples/accelerate_profile.py map.json

`profiler.backward(losses)` replaces `accelerator.backward(sum(losses.values()))`, and the loop stays as it
is: the model trains as it would, and you get a map of the conflicts. The network is that of own_problem.py.

`accelerator.backward` does two things besides: it divides the loss by the number of batches that are accumulated, and
with fp16 it scales it, so that small gradients do not vanish. Do the same to each task's loss (`scaled` below). The
scores are those of cosines, which no scale changes; a batch that overflows, which Accelerate's optimizer leaves
out, is in no score either.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from own_problem import problem
from torch import Tensor, nn

import recon


def scaled(loss: Tensor, accelerator: Accelerator) -> Tensor:
    """What `accelerator.backward(loss)` would differentiate."""
    loss = loss / accelerator.gradient_accumulation_steps
    return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)


def main(path: str, mixed_precision: str | None = None) -> nn.Module:
    """Train for three epochs, an optimizer step for every two batches; write the conflict map to `path`."""
    torch.manual_seed(0)
    digits = problem()
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    model = digits.make_model()
    model, optimizer, loader = accelerator.prepare(
        model, digits.make_optimizer(model.parameters()), digits.make_loaders(0)[0]
    )
    profiler = recon.Profiler(model)
    for _ in range(3):
        for images, targets in loader:
            with accelerator.accumulate(model):
                outputs = model(images)
                losses = {task.name: task.loss(outputs[task.name], targets[task.name]) for task in digits.tasks}
                profiler.backward({name: scaled(loss, accelerator) for name, loss in losses.items()})
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    cmap = profiler.conflict_map({"problem": digits.name, "mixed_precision": accelerator.mixed_precision})
    scores = cmap.scores()
    for layer in cmap.ranking():
        accelerator.print(f"{layer:6} conflicts in {scores[layer]} of {cmap.steps} batches")
    if accelerator.is_main_process:
        cmap.save(path)
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
