"""recon.check: what it says of the models that users bring, and that nothing is changed."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from transformers import BertConfig, BertModel

import recon
from recon.errors import PlanError, UsageError
from tests.training.test_checkpoints import LOSSES, Net, Noisy


def batch(samples=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=generator)
    return x, {"a": x.sum(1), "b": x[:, 0]}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def only(messages):
    assert len(messages) == 1, messages
    return messages[0]


def test_a_good_model_has_no_problem(net):
    report = recon.check(net, batch(), LOSSES)
    assert report.ok and not report.problems and not report.warnings
    assert report.tasks == ("a", "b") and report.seen == {"a": 1, "b": 1} and not report.never_met
    torch.manual_seed(1)
    assert all(torch.tensor(loss).isfinite() for loss in report.losses.values())
    assert report.shared == dict.fromkeys(("stem", "norm", "mix"), ("a", "b")) and report.layers == 5
    assert report.branched == ("stem", "norm", "mix") and not report.refusal
    # Linear(6, 8), BatchNorm1d(8), Linear(8, 6), and two Linear(6, 1)
    assert report.shared_parameters == 56 + 16 + 54 and report.parameters == 126 + 14
    assert report.macs == 6 * 8 + 8 * 6 + 2 * 6
    assert set(report.step_seconds) == {"plain", "exact", "sketch"} and min(report.step_seconds.values()) > 0
    assert report.step_bytes["exact"] == 2 * 126 * 4
    text = str(report)
    assert "Shared layers: 3 of 5, with 126 of 140 parameters" in text and "works in mode 'fan'" in text
    assert text.endswith("Profiling and converting would work.")


def test_the_losses_are_those_of_the_first_step(net):
    x, targets = batch()
    report = recon.check(net, (x, targets), LOSSES, timed=False)
    outputs = net.train()(x)  # dropout draws what it drew before: the random state was put back
    assert report.losses == {task: LOSSES[task](outputs[task], targets[task]).item() for task in LOSSES}
    assert report.step_seconds == {}


class Scaled(nn.Module):
    """A loss with a parameter and running statistics of its own."""

    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm1d(1)

    def forward(self, output, target):
        return F.mse_loss(self.norm(output[:, None])[:, 0] * self.scale, target)


class Counting(Net):
    """It remembers its calls, writes into its input, and draws from every global generator."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.seen.append(random.random() + np.random.rand())
        self.mean.mul_(0.9)
        x.add_(self.mean + 1)
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_nothing_is_changed(training, with_gradients):
    model = Counting().train(training)
    model.norm.eval()  # a module in another mode than the model
    losses = {"a": Scaled(), "b": LOSSES["b"]}
    leaves = [*model.parameters(), *losses["a"].parameters()]
    for leaf in leaves if with_gradients else []:
        leaf.grad = torch.full_like(leaf, 3)
    gradients = [leaf.grad for leaf in leaves]
    before = copy.deepcopy((model.state_dict(), losses["a"].state_dict()))
    x, targets = batch()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(3), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    report = recon.check(model, (x, targets), losses)
    assert "sketch" in report.step_seconds
    assert torch.equal(torch.rand(3), expected[0]) and (random.random(), np.random.rand()) == expected[1:]
    for now, then in zip((model.state_dict(), losses["a"].state_dict()), before, strict=True):
        assert list(now) == list(then) and all(torch.equal(now[name], value) for name, value in then.items())
    assert all(leaf.grad is gradient for leaf, gradient in zip(leaves, gradients, strict=True))
    assert all((gradient == 3).all() for gradient in gradients if gradient is not None)
    assert model.training == training and not model.norm.training and losses["a"].training
    assert model.calls == 0 and model.seen == [] and torch.equal(x, batch()[0])


def test_a_training_is_the_same_after_a_check():
    states = []
    for checked in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        model, loader = Net(), DataLoader(Noisy(own=True), 8, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if checked:
            assert recon.check(model, None, LOSSES, loader=loader, optimizer=optimizer).ok
        cmap = recon.profile(model, loader, LOSSES, optimizer=optimizer, epochs=2)
        states.append((model.state_dict(), [layer.histogram.tolist() for layer in cmap.layers]))
    (plain, counts), (checked, checked_counts) = states
    assert all(torch.equal(plain[name], checked[name]) for name in plain) and counts == checked_counts


class Reads(Net):
    """Reads a value of the shared features into Python."""

    def forward(self, x):
        x = self.norm(self.stem(x))
        if x.mean().item() > 100:  # the statement to name
            x = -x
        x = self.mix(x.relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


class ThroughNumpy(Net):
    def forward(self, x):
        x = self.norm(self.stem(x))
        order = np.argsort(x.detach().numpy().sum(1))
        return super().forward(x[torch.from_numpy(order)][:, :6])


@pytest.mark.parametrize(
    ("model", "statement"), [(Reads, r"if x\.mean\(\)\.item\(\) > 100"), (ThroughNumpy, r"order = np\.argsort")]
)
def test_the_statement_that_a_fan_cannot_pass_is_named(model, statement):
    report = recon.check(model(), batch(), LOSSES, timed=False)
    assert not report.ok
    message = only(report.problems)
    assert re.search(rf"test_check\.py:\d+, in {model.__name__}\.forward: `{statement}", message), message
    assert "mode='per-task'" in message and "Tried: it works." in message
    assert report.refusal == message


def test_the_layers_behind_the_statement_can_be_branched():
    report = recon.check(Reads(), batch(), LOSSES, timed=False)
    assert report.branched == ("mix",)
    assert "works for the last 1 of the 3 shared layers, from mix on" in str(report)
    recon.convert(Reads(), recon.BranchPlan.per_task(["mix"], ("a", "b")), batch()[0])


def test_in_mode_per_task_there_is_no_such_problem():
    report = recon.check(Reads(), batch(), LOSSES, mode="per-task", timed=False)
    assert report.ok and report.branched == ("stem", "norm", "mix") and report.mode == "per-task"


class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})

    def forward(self, x):
        return {task: net(x).squeeze(1) for task, net in self.nets.items()}


def test_tasks_that_share_nothing():
    report = recon.check(Apart(), batch(), LOSSES)
    assert "No layer is shared" in only(report.problems) and "backbone" in report.problems[0]
    assert report.strangers == (("a", "b"),) and report.shared == {}


def test_a_frozen_backbone_is_no_shared_layer(net):
    for module in (net.stem, net.norm, net.mix):
        module.requires_grad_(False)
    report = recon.check(net, batch(), LOSSES)
    assert "thaw it" in only(report.problems) and report.frozen == ("stem", "norm", "mix")


def test_a_loss_that_is_nan(net):
    report = recon.check(net, batch(), {**LOSSES, "b": lambda output, target: (output - 100).log().mean()})
    assert "The loss of task 'b' is nan before anything is trained" in only(report.problems)
    assert "logarithm" in report.problems[0]


def test_a_loss_that_is_no_scalar(net):
    report = recon.check(net, batch(), {**LOSSES, "b": lambda output, target: (output - target).square()})
    assert "'b' must be a scalar tensor, but is shape (8,)" in only(report.problems)


def test_a_loss_that_depends_on_no_parameter(net):
    report = recon.check(net, batch(), {**LOSSES, "b": lambda output, target: F.mse_loss(output.detach(), target)})
    assert "'b' depends on no trainable parameter" in only(report.problems)


def test_a_loss_that_fails(net):
    def broken(output, target):
        raise RuntimeError("no such label")

    message = only(recon.check(net, batch(), {**LOSSES, "b": broken}).problems)
    assert "RuntimeError: no such label" in message and "in broken" in message


class Tuple(Net):
    def forward(self, x):
        return tuple(super().forward(x).values())


def test_a_model_that_returns_a_tuple():
    message = only(recon.check(Tuple(), batch(), LOSSES).problems)
    assert "must return {task name: output}, but it returned tuple" in message
    assert "recon.name_outputs" in message and "Problem(output_names=" in message


def test_what_each_task_runs_into_is_told_once():
    x, targets = batch()
    apart = {task: (x, target) for task, target in targets.items()}
    assert "it returned tuple" in only(recon.check(Tuple(), apart, LOSSES).problems)


class Fails(Net):
    def forward(self, x):
        return self.mix(x)  # 6 features, not 8


def test_a_forward_that_fails_is_a_finding_with_its_line():
    message = only(recon.check(Fails(), batch(), LOSSES).problems)
    assert "RuntimeError: mat1 and mat2 shapes cannot be multiplied" in message
    assert "test_check.py" in message and "return self.mix(x)" in message


class More(Net):
    def forward(self, x):
        outputs = super().forward(x)
        return {"features": x, **outputs}


def test_outputs_that_no_task_uses():
    report = recon.check(More(), batch(), LOSSES, timed=False)
    assert report.ok and report.unused_outputs == ("features",)
    assert "Outputs that no task uses: features." in str(report)


def test_an_output_that_is_missing(net):
    x, targets = batch()
    named = x, {**targets, "c": 0}
    message = only(recon.check(net, batch(), {**LOSSES, "c": F.mse_loss}, loader=[named]).problems)
    assert "no entry for task 'c'" in message


def one_task(task):
    x, targets = batch()
    return x, {task: targets[task]}


def test_tasks_that_never_meet(net):
    loader = [one_task("a"), one_task("b")] * 3
    report = recon.check(net, None, LOSSES, loader=loader, timed=False)
    message = only(report.problems)
    assert "No two tasks meet in the first 6 batches (a in 3, b in 3)" in message
    assert all(way in message for way in ("recon.joint_loader", "recon.Window", "accumulate='tasks'"))
    assert report.never_met == (("a", "b"),) and report.shared and report.branched


class Three(Net):
    def __init__(self):
        super().__init__()
        self.heads["c"] = nn.Linear(6, 1)


def test_pairs_that_never_meet():
    x, targets = batch()
    losses = {**LOSSES, "c": F.mse_loss}
    loader = [(x, targets), (x, {"c": x[:, 1]})] * 2
    report = recon.check(Three(), None, losses, loader=loader, timed=False)
    assert report.ok and "never meet in the first 4 batches: a and c, b and c" in only(report.warnings)
    assert report.seen == {"a": 2, "b": 2, "c": 2} and report.shared["stem"] == ("a", "b", "c")


def test_a_task_without_a_target_in_the_batch():
    report = recon.check(Three(), batch(), {**LOSSES, "c": F.mse_loss}, timed=False)
    assert "In the batch, 'c' has no target" in " ".join(report.warnings)


def test_a_task_that_is_absent_from_the_whole_loader():
    losses = {**LOSSES, "c": F.mse_loss}
    report = recon.check(Three(), None, losses, loader=[batch()] * 6, timed=False)
    assert "No batch of the loader (6 in all) had a target for 'c'" in only(report.problems)
    assert not report.ok and not any("'c'" in warning for warning in report.warnings)
    assert recon.check(Three(), batch(), losses, loader=[batch()] * 6, timed=False).problems == report.problems


def test_a_task_that_is_absent_from_the_first_batches_only():
    losses = {**LOSSES, "c": F.mse_loss}
    report = recon.check(Three(), None, losses, loader=[batch()] * 21, timed=False)
    assert report.ok and "In the first 20 batches, 'c' has no target" in " ".join(report.warnings)


def test_a_loss_of_the_whole_batch_that_never_has_a_task():
    def never(outputs, batch):
        return {"a": outputs["a"].mean(), "b": outputs["b"].mean(), "c": None}

    report = recon.check(Three(), None, never, tasks=("a", "b", "c"), loader=[batch()] * 2, timed=False)
    message = only(report.problems)
    assert "your loss gave None for 'c' in every batch" in message and "Leave it out of tasks=" in message


def test_tasks_that_never_meet_beside_a_name_that_is_wrong():
    x, targets = batch()
    losses = {**LOSSES, "zzz": F.mse_loss}
    loader = [(x, {task: targets["a"]}) for task in losses] * 6
    report = recon.check(Three(), None, losses, loader=loader, timed=False)
    wrong, lonely = report.problems
    assert "no entry for task 'zzz'" in wrong
    assert "No two tasks meet in the first 18 batches (a in 6, b in 6, zzz in 6)" in lonely
    assert "all tasks meet" not in str(report) and len(report.never_met) == 3


def test_the_batch_is_not_counted_beside_the_loader(net):
    loader = [one_task("a"), one_task("b")] * 3
    report = recon.check(net, loader[0], LOSSES, loader=loader, timed=False)
    assert report.batches == 6 and report.seen == {"a": 3, "b": 3}
    assert "in the first 6 batches (a in 3, b in 3)" in only(report.problems)


def test_batches_that_are_gathered_into_joint_steps(net):
    loader = [one_task("a"), one_task("b")] * 3
    report = recon.check(net, None, LOSSES, loader=loader, accumulate="tasks")
    assert report.ok and report.seen == {"a": 3, "b": 3} and report.step_seconds
    assert "In the first 3 joint steps, all tasks meet." in str(report)


def test_a_batch_of_another_form(net):
    assert "A batch must be (inputs, {task name: target})" in only(recon.check(net, torch.ones(3), LOSSES).problems)


def test_a_loader_that_fails_or_is_empty(net):
    def failing():
        yield one_task("a")
        raise OSError("no such image")

    class Loader:
        __iter__ = staticmethod(failing)

    assert "no such image" in only(recon.check(net, None, LOSSES, loader=Loader()).problems)
    assert "gave no batch" in only(recon.check(net, None, LOSSES, loader=[]).problems)


def test_an_optimizer_that_needs_a_closure(net):
    report = recon.check(net, batch(), LOSSES, optimizer=torch.optim.LBFGS(net.parameters()), timed=False)
    assert "LBFGS.step needs closure" in only(report.problems)


def test_a_lazy_module_is_not_initialised(net):
    net.stem = nn.LazyLinear(8)
    assert "'stem.weight' is not initialised" in only(recon.check(net, batch(), LOSSES).problems)
    assert isinstance(net.stem, nn.LazyLinear)


def test_a_batch_of_one_sample(net):
    net.norm = nn.LayerNorm(8)
    assert "one sample" in " ".join(recon.check(net, batch(1), LOSSES).warnings)


def test_a_wrapped_model(net):
    report = recon.check(nn.DataParallel(net), batch(), LOSSES, timed=False)
    assert report.ok and "needs the plain module inside" in only(report.warnings)


def test_a_layer_that_no_task_reaches(net):
    net.spare = nn.Linear(2, 2)
    report = recon.check(net, batch(), LOSSES, timed=False)
    assert (
        report.ok
        and report.unreached == ("spare",)
        and "no gradient from any task here: spare." in only(report.warnings)
    )


def test_a_model_that_is_compiled_as_one(net):
    compiled = torch.compile(net, backend="aot_eager")
    report = recon.check(compiled, batch(), LOSSES)
    assert "donated_buffer = False" in only(report.problems)
    assert "compiled as one" in report.warnings[0] and "plain module inside" in report.warnings[1]
    assert report.branched == ("stem", "norm", "mix")


class Engine(Net):
    """What DeepSpeed returns looks like this."""

    def backward(self, loss): ...

    def step(self): ...

    def save_checkpoint(self, path): ...


def test_an_engine_that_makes_its_own_gradients():
    assert "engine with backward() and step()" in only(recon.check(Engine(), batch(), LOSSES).problems)


class Closure(Net):
    def __init__(self):
        super().__init__()
        self.first = lambda x: self.stem(x)

    def forward(self, x):
        x = self.mix(self.norm(self.first(x)).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def test_a_copy_that_would_still_use_the_original():
    assert "a function (a lambda, say)" in only(recon.check(Closure(), batch(), LOSSES, timed=False).problems)


class Reentrant(Net):
    def forward(self, x):
        x = x.requires_grad_()
        x = checkpoint(self.stem, x, use_reentrant=True)
        x = self.mix(self.norm(x).relu())
        return {task: head(x).squeeze(1) for task, head in self.heads.items()}


def test_a_reentrant_checkpoint():
    assert "use_reentrant=False" in only(recon.check(Reentrant(), batch(), LOSSES).problems)


class Esmm(nn.Module):
    """Entire-space click and conversion (Ma et al. 2018): two towers on shared embeddings, and their product."""

    def __init__(self, sparse=False):
        super().__init__()
        self.embedding = nn.Embedding(50, 4, sparse=sparse)
        self.ctr, self.cvr = (nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 1)) for _ in range(2))

    def forward(self, ids):
        x = self.embedding(ids).flatten(1)
        ctr = self.ctr(x).sigmoid()
        return {"ctr": ctr, "ctcvr": ctr * self.cvr(x).sigmoid()}


def clicks():
    targets = {"ctr": torch.ones(8, 1), "ctcvr": torch.zeros(8, 1)}
    return (torch.arange(24).view(8, 3), targets), dict.fromkeys(targets, F.binary_cross_entropy)


def test_a_task_whose_output_is_made_from_another():
    report = recon.check(Esmm(), *clicks())
    assert report.ok and report.reads == {"ctcvr": ("ctr",)}
    assert list(report.shared) == ["embedding", "ctr.0", "ctr.2"]
    assert "computed from that of ctr" in str(report)


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), "embedding.weight are sparse, which Adam"),
        (lambda m: torch.optim.SparseAdam(m.parameters()), r"ctr.0.weight, .*, \.\.\. are dense, which SparseAdam"),
        (lambda m: torch.optim.SGD(m.parameters()), ""),
        (
            lambda m: [
                torch.optim.SparseAdam(m.embedding.parameters()),
                torch.optim.Adam([*m.ctr.parameters(), *m.cvr.parameters()]),
            ],
            "",
        ),
    ],
    ids=["adam", "sparse-adam", "sgd", "both"],
)
def test_an_optimizer_that_does_not_take_the_gradients(make, refused):
    model = Esmm(sparse=True)
    report = recon.check(model, *clicks(), optimizer=make(model), timed=False)
    assert report.ok == (not refused)
    if refused:
        assert re.search(refused, only(report.problems))
        (ids, targets), losses = clicks()
        with pytest.raises((UsageError, RuntimeError)):  # as it would be in the first step
            recon.train(model, [(ids, targets)], losses, optimizer=make(model))


def test_a_transformer_with_three_heads():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
            self.bert = BertModel(BertConfig(vocab_size=60, **size), add_pooling_layer=False)
            self.heads = nn.ModuleDict({"ner": nn.Linear(16, 5), "cls": nn.Linear(16, 2), "sim": nn.Linear(16, 1)})

        def forward(self, input_ids, attention_mask):
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            return {
                "ner": self.heads["ner"](hidden).mT,
                "cls": self.heads["cls"](hidden[:, 0]),
                "sim": self.heads["sim"](hidden.mean(1)).squeeze(1),
            }

    ids = torch.randint(60, (4, 7))
    targets = {"ner": torch.randint(5, (4, 7)), "cls": torch.randint(2, (4,)), "sim": torch.rand(4)}
    losses = {"ner": F.cross_entropy, "cls": F.cross_entropy, "sim": F.mse_loss}
    inputs = recon.inputs(input_ids=ids, attention_mask=torch.ones_like(ids))
    report = recon.check(Encoder(), (inputs, targets), losses)
    assert report.ok and set(report.shared.values()) == {("ner", "cls", "sim")}
    assert len(report.branched) == len(report.shared) == report.layers - 3


def test_a_resnet_with_a_pyramid_and_nested_outputs():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            levels = {"layer1": "0", "layer2": "1"}
            self.body = BackboneWithFPN(resnet18(), levels, [64, 128], 8)
            self.heads = nn.ModuleDict({"seg": nn.Conv2d(8, 3, 1), "depth": nn.Conv2d(8, 1, 1)})

        def forward(self, images):
            levels = self.body(images)
            return {task: {name: head(level) for name, level in levels.items()} for task, head in self.heads.items()}

    def finest(output, target):
        return (output["0"] - target).abs().mean() + output["1"].square().mean()

    images = torch.randn(2, 3, 32, 32), {"seg": 0.0, "depth": 1.0}
    report = recon.check(Pyramid(), images, dict.fromkeys(images[1], finest), timed=False)
    assert report.ok and len(report.shared) == report.layers - 2 and report.macs > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear, batch(), LOSSES), "needs the torch.nn.Module that trains, not the class Linear"),
        ((Net(), None, LOSSES), "needs a batch"),
        ((Net(), batch(), [F.mse_loss]), "losses is a list. Pass"),
        ((Net(), batch(), {"a": F.mse_loss}), "at least two tasks, but is a dict of 1"),
        ((Net(), batch(), {"a": F.mse_loss, "b": 3}), "loss of task 'b' is 3, which cannot be called"),
    ],
    ids=["class", "no-batch", "list", "one-task", "no-function"],
)
def test_wrong_usage_is_raised(arguments, message):
    with pytest.raises(UsageError, match=message):
        recon.check(*arguments)


def test_a_mode_that_does_not_exist(net):
    with pytest.raises(PlanError, match="fan"):
        recon.check(net, batch(), LOSSES, mode="fans")


def test_batches_of_single_tasks(net):
    x, targets = batch()
    apart = {"a": (x, targets["a"]), "b": (x[:4] + 1, targets["b"][:4])}
    report = recon.check(net, apart, LOSSES)
    assert report.ok and report.shared == dict.fromkeys(("stem", "norm", "mix"), ("a", "b"))
    assert report.branched and report.step_seconds and report.samples is None
    assert "The running statistics of norm are shared, and see the tasks' batches one after the" in str(report)
    torch.manual_seed(0)
    later = recon.check(net, None, LOSSES, loader=[{"a": apart["a"]}, {"b": apart["b"]}, apart], timed=False)
    assert later.ok and later.seen == {"a": 2, "b": 2} and later.batches == 3


def test_joined_loaders(net):
    x, targets = batch()
    loader = recon.joint_loader({task: [(x, targets[task])] * (3 - n) for n, task in enumerate(targets)})
    report = recon.check(net, None, LOSSES, loader=loader, timed=False)
    assert report.ok and report.batches == 1 and report.seen == {"a": 1, "b": 1}


def test_a_batch_of_single_tasks_of_another_form(net):
    x, targets = batch()
    message = only(recon.check(net, {"a": (x, targets["a"]), "b": targets["b"]}, LOSSES).problems)
    assert "must be {task name: (inputs, target)}, but the data loader gave one with 'b': Tensor" in message


def whole_batch(outputs, batch):
    """Targets under names of their own; the second task is there in every other batch only."""
    _, targets = batch
    losses = {"a": F.mse_loss(outputs["a"], targets["sum"])}
    return losses if targets["first"] is None else {**losses, "b": F.l1_loss(outputs["b"], targets["first"])}


def test_a_loss_of_the_whole_batch(net):
    x, targets = batch()
    joint = x, {"sum": targets["a"], "first": targets["b"]}
    report = recon.check(net, joint, whole_batch, tasks=("a", "b"))
    expected = recon.check(net, batch(), LOSSES, timed=False)
    assert report.ok and report.losses == expected.losses and report.shared == expected.shared
    assert report.step_seconds and report.branched
    alone = x, {"sum": targets["a"], "first": None}
    report = recon.check(net, None, whole_batch, tasks=("a", "b"), loader=[alone, joint], timed=False)
    assert report.ok and report.batches == 2 and report.seen == {"a": 2, "b": 1}


def test_a_loss_that_is_none_leaves_its_task_out(net):
    x, targets = batch()
    losses = {**LOSSES, "b": lambda output, target: None}
    assert "No two tasks meet in the batch (a in 1)" in only(recon.check(net, (x, targets), losses).problems)
