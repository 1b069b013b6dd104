"""Training loops of others, and of one's own: a branched model in each, and recon's backward where a loop has one."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import recon
from tests import oracle
from tests.companions import check_profiled_step

TASKS = ("a", "b")
LOSSES = {
    "a": lambda out, target: (out - target).square().mean(),
    "b": lambda out, target: (out - target).cos().mean(),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(4, 2) for task in TASKS})

    def forward(self, x):
        x = self.body(x)
        return {task: head(x) for task, head in self.heads.items()}


class Samples(Dataset):
    def __init__(self, count=12):
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 5, generator=draw, dtype=torch.float64)
        self.targets = {task: torch.randn(count, 2, generator=draw, dtype=torch.float64) for task in TASKS}

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], **{f"target_{task}": target[i] for task, target in self.targets.items()}}


def losses_of(model, batch):
    outputs = model(batch["x"])
    return {task: LOSSES[task](outputs[task], batch[f"target_{task}"]) for task in TASKS}


def branched_net():
    torch.manual_seed(0)
    model = Net().double()
    plan = recon.BranchPlan.per_task(["body.0"], TASKS)  # so that the norm's statistics follow
    branched = recon.convert(model, plan, torch.randn(4, 5, dtype=torch.float64))
    oracle.perturb(branched)
    return branched


def trained_by_hand(model, method=None, samples=Samples):
    """What a plain loop over the same batches makes of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    solver = recon.methods.get(method) if method else None
    for _ in range(2):
        for batch in DataLoader(samples(), batch_size=4):
            optimizer.zero_grad()
            if solver is None:
                sum(losses_of(model, batch).values()).backward()
            else:
                recon.backward(losses_of(model, batch), model, solver)
            optimizer.step()
    return model


def assert_same_state(model, expected):
    theirs = expected.state_dict()
    for name, value in model.state_dict().items():
        oracle.assert_close(value, theirs[name], name)


# Lightning.


@pytest.fixture
def fit(tmp_path):
    """Fits a module as Lightning does."""
    lightning = pytest.importorskip("lightning")

    def fit(module):
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(Samples(), batch_size=4))
        assert trainer.global_step == 6 and not list(tmp_path.iterdir())

    return fit


def module_of(model, profiler=None, method=None):
    """A LightningModule that trains a model: by recon, if a profiler or a method is given."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.automatic_optimization = profiler is None and method is None

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

        def training_step(self, batch, number):
            losses = losses_of(self.model, batch)
            if self.automatic_optimization:
                return sum(losses.values())
            optimizer = self.optimizers()
            optimizer.zero_grad()
            recon.backward(losses, self.model, method, profiler=profiler)
            optimizer.step()
            return None

    return Module()


lightning_warns = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@lightning_warns
def test_lightning_trains_a_branched_model(fit):
    model = branched_net()
    expected = trained_by_hand(copy.deepcopy(model))
    fit(module_of(model))
    assert_same_state(model, expected)


@lightning_warns
@pytest.mark.parametrize("method", [None, "pcgrad"], ids=["joint", "pcgrad"])
def test_lightning_with_a_backward_of_recon(fit, method):
    torch.manual_seed(0)
    model = Net().double()
    expected = trained_by_hand(copy.deepcopy(model), method)
    profiler = recon.Profiler(model)
    fit(module_of(model, profiler, recon.methods.get(method or "joint")))
    assert_same_state(model, expected)
    cmap = profiler.conflict_map()
    assert cmap.steps == 6 and [layer.name for layer in cmap.layers] == ["body.0", "body.1", "body.3"]


# Hugging Face's Trainer.


class Texts(Samples):
    """Token ids in place of features."""

    def __init__(self):
        super().__init__()
        self.x = torch.randint(20, (12, 5), generator=torch.Generator().manual_seed(0))


class TwoTaskBert(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=20, max_position_embeddings=8, **sizes, **dropout)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in TASKS})

    def forward(self, x):
        x = self.bert(x).last_hidden_state[:, 0]
        return {task: head(x) for task, head in self.heads.items()}


@pytest.fixture
def bert():
    """Branched in its last block."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = TwoTaskBert().double()
    plan = recon.BranchPlan.per_task(["bert.encoder.layer.1.output.dense"], TASKS)
    branched = recon.convert(model, plan, Texts().x)
    oracle.perturb(branched)
    return branched


def trainer_of(model, folder, method=None):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class OfTasks(Trainer):
        def get_train_dataloader(self):
            return DataLoader(Texts(), batch_size=4)

        def compute_loss(self, model, inputs, *args, **kwargs):
            return sum(losses_of(model, inputs).values())

    class OfGradients(OfTasks):
        def training_step(self, model, inputs, *args):
            losses = losses_of(model.train(), self._prepare_inputs(inputs))
            recon.backward(losses, model, method)
            return sum(losses.values()).detach()

    quiet = {"report_to": [], "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    settings = TrainingArguments(str(folder), num_train_epochs=2, use_cpu=True, max_grad_norm=0.0, **quiet)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    cls = OfTasks if method is None else OfGradients
    return cls(model, settings, train_dataset=Texts(), optimizers=(optimizer, constant))


@pytest.mark.parametrize("method", [None, "pcgrad"], ids=["compute_loss", "training_step"])
def test_hugging_faces_trainer_trains_a_branched_model(bert, method, tmp_path):
    expected = trained_by_hand(copy.deepcopy(bert), method, samples=Texts)
    trainer_of(bert, tmp_path, method and recon.methods.get(method)).train()
    assert_same_state(bert, expected)


# A learning rate finder.


def losses_by_rate(model, rates):
    """A range test: the loss of the first batch after a step at each rate, and all put back as it was."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0], momentum=0.9)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    batch = next(iter(DataLoader(Samples(), batch_size=12)))
    found = []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(2):
            losses = losses_of(model, batch)
            optimizer.zero_grad()
            recon.backward(losses, model, recon.methods.get("pcgrad"))
            optimizer.step()
        found.append(sum(losses_of(model, batch).values()).item())
        model.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(moments))
    return found


def test_a_learning_rate_finder_finds_the_same_again_and_leaves_the_model_as_it_was():
    model, rates = branched_net(), [0.01, 0.1, 1.0]
    untouched = copy.deepcopy(model)
    found = losses_by_rate(model, rates)
    assert len(set(found)) == 3
    assert losses_by_rate(copy.deepcopy(untouched), rates[1:]) == found[1:]
    for (name, value), other in zip(model.state_dict().items(), untouched.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert_same_state(trained_by_hand(model, "pcgrad"), trained_by_hand(untouched, "pcgrad"))


# Physics-informed networks.

PHYSICS = ("r", "w", "m")  # the equation's residual, the walls, and what was measured


class Field(nn.Module):
    """u(x, t), smooth."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, points):
        u = self.last(torch.tanh(self.hidden(torch.tanh(self.first(points)))))[:, 0]
        return dict.fromkeys(PHYSICS, u)


def field():
    torch.manual_seed(0)
    return Field().double()


def points(count, seed):
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def physics_of(model):
    """The heat equation u_t = u_xx, by second derivatives; u = 0 on the walls; and some measurements."""
    inside, walls, measured = points(6, 0).requires_grad_(), points(4, 1).round(), points(3, 2)
    u = model(inside)["r"]
    (slope,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
    (curve,) = torch.autograd.grad(slope[:, 0].sum(), inside, create_graph=True)
    return {
        "r": (slope[:, 1] - curve[:, 0]).square().mean(),
        "w": model(walls)["w"].square().mean(),
        "m": (model(measured)["m"] - measured[:, 0].sin()).square().mean(),
    }


def test_a_physics_informed_network_is_profiled():
    cmap = check_profiled_step(field(), physics_of)
    assert [layer.name for layer in cmap.layers] == ["first", "hidden", "last"] and cmap.tasks == PHYSICS
    assert all(layer.observed.sum() == 3 for layer in cmap.layers)  # the residual reaches the last layer's weight


@pytest.mark.parametrize("method", ["joint", "mgda"])
@pytest.mark.parametrize("layers", [[], ["hidden"], ["first", "last"]], ids=["plain", "hidden", "ends"])
def test_a_physics_informed_network_trains_by_any_method(layers, method):
    """A task's gradients are autograd's in the plain network with the task's copies, second derivatives and all."""
    model = field()
    if layers:
        plan = recon.BranchPlan.grouped({layer: [["r"], ["w", "m"]] for layer in layers}, PHYSICS)
        model = recon.convert(model, plan, points(4, 3))
        oracle.perturb(model)
    rows = {task: task_gradients(model, task, bool(layers)) for task in PHYSICS}
    recon.backward(physics_of(model), model, recon.methods.get(method))
    named = dict(model.named_parameters())
    shared = [name for name in named if sum(name in row for row in rows.values()) > 1]
    J = torch.stack(
        [torch.cat([row.get(n, torch.zeros_like(named[n])).flatten() for n in shared]) for row in rows.values()]
    )
    expected = J.sum(0) if method == "joint" else recon.methods.get(method)(J)
    oracle.assert_close(torch.cat([named[name].grad.flatten() for name in shared]), expected, method)
    for name in set(named) - set(shared):
        alone = [row[name] for row in rows.values() if name in row]
        if not alone:  # the residual's own copy of the last bias, which no derivative sees
            assert named[name].grad is None, name
            continue
        oracle.assert_close(named[name].grad, alone[0], name)


def task_gradients(model, task, branched):
    plain = oracle.plain_model(field, model, task) if branched else copy.deepcopy(model)
    names = oracle.keys_of(model, task, set(dict(plain.named_parameters())))
    physics_of(plain)[task].backward()
    return {names[key]: p.grad for key, p in plain.named_parameters() if p.grad is not None}
