"""Three tasks from three loaders in a Hugging Face Trainer: joint steps, profiled, with a gradient method.

Run it from the folder above, with `pip install transformers accelerate`:

    python examples/three_loaders_trainer.py map.json

Tasks of the kind of GLUE's come in batches of their own, and a trainer that takes one of them a step has no two
gradients to compare. `recon.joint_loader` joins the loaders to `{task: (inputs, target)}`, a batch of each task, and
a `recon.Window` makes one step of it: each task runs its own forward and backward, one graph at a time. All else is
the Trainer's: schedule, clipping, checkpoints, logs.

The encoder is a small BERT with random weights and the texts are made up, so that it runs in seconds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import recon

WORDS, LENGTH = 100, 12
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "topic": cross_entropy,
    "tags": cross_entropy,
    "score": mse_loss,
}


class Encoder(nn.Module):
    """A shared encoder with a head for each task: a class of the text, a class of each word, a number."""

    def __init__(self) -> None:
        super().__init__()
        size: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
        self.bert = BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **size))
        self.heads = nn.ModuleDict({"topic": nn.Linear(32, 4), "tags": nn.Linear(32, 3), "score": nn.Linear(32, 1)})

    def forward(self, input_ids: Tensor, task: str | None = None) -> dict[str, Tensor]:
        """`{task: output}`, of one task where it is named."""
        found = self.bert(input_ids)
        of = {"topic": found.pooler_output, "tags": found.last_hidden_state, "score": found.pooler_output}
        outputs = {name: self.heads[name](of[name]) for name in ([task] if task else LOSSES)}
        shaped = {"tags": lambda x: x.transpose(1, 2), "score": lambda x: x.squeeze(-1)}
        return {name: shaped.get(name, lambda x: x)(output) for name, output in outputs.items()}


def loaders() -> dict[str, DataLoader[Any]]:
    """Made-up texts: each task has its own, as many as it has, in batches of its own size."""
    draw = torch.Generator().manual_seed(0)

    def texts(count: int) -> Tensor:
        return torch.randint(WORDS, (count, LENGTH), generator=draw)

    topic, tags, score = texts(256), texts(128), texts(192)
    data = {
        "topic": (TensorDataset(topic, topic[:, 0] % 4), 32),
        "tags": (TensorDataset(tags, tags % 3), 16),
        "score": (TensorDataset(score, score.float().mean(dim=1) / WORDS), 24),
    }
    return {task: DataLoader(of, batch_size=size, shuffle=True) for task, (of, size) in data.items()}


class JointTrainer(Trainer):
    """A Trainer whose steps are joint steps of several tasks.

    Args:
        tasks: `{task: loader}`.
        method: of `recon.methods`.
    """

    def __init__(self, model: nn.Module, tasks: dict[str, DataLoader[Any]], method: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.joint = recon.joint_loader(tasks)
        self.profiler = recon.Profiler(model)
        self.window = recon.Window(model, method, profiler=self.profiler, tasks=tuple(tasks))

    def get_train_dataloader(self) -> Any:
        """See `Trainer`: here, batches `{task: (inputs, target)}`."""
        return self.joint

    def training_step(self, model: nn.Module, inputs: Any, *_: Any) -> Tensor:
        """See `Trainer`: one joint step, task by task; the mean of the losses is logged."""
        model.train()
        losses = []
        for task, (texts, target) in self._prepare_inputs(inputs).items():
            loss = LOSSES[task](model(texts, task)[task], target)
            self.window.add(task, loss)
            losses.append(loss.detach())
        self.window.step()
        return torch.stack(losses).mean()


def main(path: str, method: str = "pcgrad", epochs: int = 3) -> recon.ConflictMap:
    """Train, and write the conflict map to `path`."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        settings = TrainingArguments(folder, num_train_epochs=epochs, use_cpu=True, learning_rate=1e-3, **quiet)
        trainer = JointTrainer(Encoder(), loaders(), method, args=settings)
        trainer.train()
    cmap = trainer.profiler.conflict_map({"method": method})
    rates = cmap.scores(by="rate")
    for name in cmap.ranking(by="rate")[:5]:
        print(f"{name:45} conflicts in {rates[name]:.0%} of {cmap.steps} joint steps")
    cmap.save(path)
    return cmap


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "pcgrad")
