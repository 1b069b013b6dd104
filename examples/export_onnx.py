"""Deploy a branched network by ONNX: what runs it needs neither PyTorch nor your code.

Run it from the folder above, with `pip install 'recon-mtl[onnx]'`:

    python examples/export_onnx.py digits.onnx

The network of own_problem.py gets a copy of two layers per task, is trained for an epoch, lowered to one graph and
written to the file. Then ONNX Runtime runs it, on a batch of another size, and PyTorch for comparison.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import torch
from own_problem import problem

import recon


def main(path: str) -> None:
    """Write the network to `path`; print how far ONNX Runtime's outputs are from PyTorch's."""
    torch.manual_seed(0)
    digits = problem()
    train, test = digits.make_loaders(0)
    (images, _), (others, _) = next(iter(train)), next(iter(test))

    plan = recon.BranchPlan.per_task(["conv2", "bn2"], tasks=("digit", "slant"))
    branched = recon.convert(digits.make_model(), plan, images)
    losses = {task.name: task.loss for task in digits.tasks}
    recon.train(branched, train, losses, optimizer=digits.make_optimizer(branched.parameters()))

    program = recon.lower(branched, images)
    names = list(plan.tasks)
    torch.onnx.export(
        program,
        f=path,
        input_names=["images"],
        output_names=names,
        dynamo=True,
        external_data=False,  # one file
        verbose=False,
    )

    session = onnxruntime.InferenceSession(path)
    outputs = dict(zip(names, session.run(names, {"images": others.numpy()}), strict=True))
    with torch.no_grad():
        expected = branched.eval()(others)
    difference = max(np.abs(outputs[name] - expected[name].numpy()).max() for name in names)
    print(f"Exported with a batch of {len(images)}, run on {len(others)}: differs from PyTorch by {difference:.1e}.")


if __name__ == "__main__":
    main(*sys.argv[1:])
