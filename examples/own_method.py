"""A gradient method of your own: a function, registered under a name, or named on the command line.

    python examples/own_method.py
    recon train digits --method examples/own_method.py:clipped_sum:length=0.5 --out run
    recon train digits --method examples/own_method.py:largest_first+pcgrad --out run

What the first parameter is called says what the function gets: `J`, the task gradients; `gramian`, their inner
products; or `losses`. Parameters after it are options. A method that must remember something from step to step is a
class, as in recon/methods/weightings/dwa.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

import recon
from recon import problems


@recon.methods.register("clipped-sum", scale="At most T times `length`.")
def clipped_sum(J: Tensor, length: float = 1.0) -> Tensor:
    """The sum of the task gradients, none of them longer than `length`: (T, P) to (P,)."""
    norms = torch.linalg.norm(J, dim=1, keepdim=True)
    return (J * (length / norms.clamp(min=length))).sum(dim=0)


@recon.methods.register("largest-first", scale="The weights add up to T.")
def largest_first(losses: Tensor) -> Tensor:
    """Weighs each loss by its share in the sum: (T,) losses to (T,) weights."""
    return len(losses) * losses / losses.sum()


def main(steps: int = 30) -> None:
    """Train for a few steps with each, alone and together."""
    problem = problems.get("digits")
    loader, _ = problem.make_loaders(0)
    for method in ("clipped-sum:length=0.5", "largest-first", "largest-first+clipped-sum", "largest-first+pcgrad"):
        torch.manual_seed(0)
        model = problem.make_model()
        left = iter(range(steps - 1, -1, -1))
        history = recon.train(
            model,
            loader,
            {task.name: task.loss for task in problem.tasks},
            optimizer=problem.make_optimizer(model.parameters()),
            method=method,
            stop=lambda left=left: next(left) == 0,  # type: ignore[misc]
        )
        losses = ", ".join(f"{task} {loss:.3f}" for task, loss in history.epochs[-1].losses.items())
        print(f"{method}: mean losses over {steps} steps: {losses}")


if __name__ == "__main__":
    main()
