"""Clicks and conversions with sparse embeddings: profile, branch and train ESMM with SparseAdam.

    python examples/esmm_sparse.py

ESMM (Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating Post-Click Conversion Rate",
SIGIR 2018) learns from all impressions: one tower says how likely a click is, another one how likely a conversion is
after a click, and their product is compared with "clicked and converted". Both stand on the same embeddings, of which a
step looks few rows up: with `sparse=True`, their gradients hold these rows alone, in recon too.

The click log is made up: users and items have hidden vectors, one pair for clicks, another one for conversions.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer, SparseAdam
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from torchmetrics.functional.classification import binary_auroc

import recon

USERS, ITEMS, WIDTH = 1000, 200, 8
LOSSES = {"click": F.binary_cross_entropy, "click and conversion": F.binary_cross_entropy}

Batch = tuple[Tensor, dict[str, Tensor]]


class ESMM(nn.Module):
    """Two towers on shared embeddings; the second task's output is the product of both towers' probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, WIDTH, sparse=True)
        self.item = nn.Embedding(ITEMS, WIDTH, sparse=True)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        self.click, self.conversion = (
            nn.Sequential(nn.Linear(3 * WIDTH, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid()) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Ids of users and items (N, 2) to probabilities (N,) by task."""
        user, item = self.user(ids[:, 0]), self.item(ids[:, 1])
        features = torch.cat([user, item, user * item], dim=1)
        click, conversion = self.click(features)[:, 0], self.conversion(features)[:, 0]
        return {"click": click, "click and conversion": click * conversion}


def click_log(impressions: int, seed: int) -> DataLoader[Any]:
    """Batches of `(ids, {task: 0 or 1})`; conversions follow clicks."""
    hidden = torch.Generator().manual_seed(0)
    draw = torch.Generator().manual_seed(1 + seed)
    users, items = (torch.randn(2, count, 3, generator=hidden) for count in (USERS, ITEMS))
    ids = torch.stack([torch.randint(n, (impressions,), generator=draw) for n in (USERS, ITEMS)], dim=1)
    # (2, N): how likely a click is, and then a conversion.
    taste = (users[:, ids[:, 0]] * items[:, ids[:, 1]]).sum(dim=2)
    likely = torch.sigmoid(taste + 2 * items[:, ids[:, 1], 0] - 1)  # some items please everyone
    click, conversion = (torch.rand(impressions, generator=draw) < p for p in likely)
    data = TensorDataset(ids, click.float(), (click & conversion).float())

    def by_task(batch: Any) -> Batch:
        ids, click, both = batch
        return ids, {"click": click, "click and conversion": both}

    numbers = BatchSampler(RandomSampler(data, generator=draw), batch_size=256, drop_last=False)
    return DataLoader(data, sampler=numbers, batch_size=None, collate_fn=by_task)  # whole batches from the tensors


def optimizers(model: nn.Module) -> list[Optimizer]:
    """SparseAdam for the tables, Adam for everything else: neither takes the other's gradients."""
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # those of branched layers, too
    others = [p for p in model.parameters() if p not in tables]
    return [SparseAdam([p for p in model.parameters() if p in tables], lr=0.02), Adam(others, lr=0.005)]


def areas(model: nn.Module, loader: DataLoader[Any]) -> dict[str, float]:
    """The area under the ROC curve by task."""
    model.eval()
    with torch.no_grad():
        found = [(model(ids), targets) for ids, targets in loader]
    outputs, targets = ({task: torch.cat([part[i][task] for part in found]) for task in LOSSES} for i in (0, 1))
    return {task: binary_auroc(outputs[task], targets[task].int()).item() for task in LOSSES}


def main(impressions: int = 40_000, epochs: int = 3) -> dict[str, dict[str, float]]:
    """Profile, plan, convert, train; print, and return by model, the areas under the curve on other impressions."""
    torch.manual_seed(0)
    train, test = click_log(impressions, seed=0), click_log(impressions // 4, seed=1)
    model = ESMM()
    cmap = recon.profile(model, train, LOSSES, optimizer=optimizers(model), epochs=epochs)
    for name, score in cmap.scores(threshold=-0.1).items():
        print(f"{name:<12} conflicts {score}")
    plan = recon.plan(cmap, model, top_k=2)
    branched = recon.convert(ESMM(), plan, next(iter(train))[0])
    print(f"branched: {', '.join(plan.layers)}")
    recon.train(branched, train, LOSSES, method="pcgrad", optimizer=optimizers(branched), epochs=epochs)
    results = {"joint": areas(model, test), "branched": areas(branched, test)}
    for name, by_task in results.items():
        print(f"{name:<10}" + ", ".join(f"{task}: {area:.3f}" for task, area in by_task.items()))
    return results


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
