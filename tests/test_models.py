import torch
from torch import nn

from recon.models import SmallResNet


def test_one_output_of_logits_per_task():
    outputs = SmallResNet({"digit": 10, "parity": 2}, in_channels=3)(torch.randn(5, 3, 12, 12))
    assert {task: tuple(logits.shape) for task, logits in outputs.items()} == {"digit": (5, 10), "parity": (5, 2)}


def test_blocks_halve_the_image_twice():
    shapes = []
    model = SmallResNet({"a": 2})
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(2, 1, 12, 12))
    assert shapes == [(8, 12, 12), (16, 6, 6), (32, 3, 3)]


def test_the_shortcut_is_the_identity_where_the_shape_stays():
    block = SmallResNet({"a": 2}).blocks[0].eval()
    nn.init.zeros_(block.bn2.weight)  # silences the main path
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(block(x), x)


def test_every_parameter_but_the_other_head_serves_a_task():
    model = SmallResNet({"a": 3, "b": 2})
    model(torch.randn(4, 1, 12, 12))["a"].square().sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert idle == {"heads.b.weight", "heads.b.bias"}
