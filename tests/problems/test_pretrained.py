import pytest
import torch
from torchvision.models import mobilenet_v2, resnet18, resnet34

from recon.errors import CheckpointError
from recon.models import MobileNetV2RASPP, ResNet18
from recon.models.pretrained import load_pretrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for make in (mobilenet_v2, resnet18, resnet34):
        torch.manual_seed(1)
        torch.save(make().state_dict(), folder / f"{make.__name__}.pth")
    return folder


def load_resnet(model, path):
    load_pretrained(model, path, "resnet18", unused=("fc.",), fresh=("heads.", "fc."))


@pytest.mark.parametrize("features", [None, 7])
def test_the_trunk_is_the_files_and_the_heads_stay_as_they_were(features, files):
    model = ResNet18({"a": 2}, in_channels=3, features=features)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_resnet(model, files / "resnet18.pth")
    given = torch.load(files / "resnet18.pth")
    for name, tensor in model.state_dict().items():
        expected = before if name.startswith(("heads.", "fc.")) else given
        assert torch.equal(tensor, expected[name]), name


def test_a_file_from_before_batches_were_counted(files, tmp_path):
    old = {name: tensor for name, tensor in torch.load(files / "resnet18.pth").items() if "num_batches" not in name}
    torch.save(old, tmp_path / "old.pth")
    model = ResNet18({"a": 2}, in_channels=3, features=None)
    load_resnet(model, tmp_path / "old.pth")
    assert torch.equal(model.layer4[1].conv2.weight, old["layer4.1.conv2.weight"])


def test_mobilenet_takes_all_but_the_last_layers(files):
    model = MobileNetV2RASPP({"a": 2})
    unused = ("features.18.", "classifier.")
    load_pretrained(model, files / "mobilenet_v2.pth", "mobilenet_v2", unused=unused, fresh=("raspp.", "heads."))
    given = torch.load(files / "mobilenet_v2.pth")
    trunk = {name for name in model.state_dict() if name.startswith("features.")}
    assert trunk == {name for name in given if not name.startswith(unused)}
    assert all(torch.equal(model.state_dict()[name], given[name]) for name in trunk)


@pytest.mark.parametrize(
    ("channels", "name", "odd"),
    [
        (3, "resnet34.pth", r"80 of .* \(layer1\.2\."),  # 8 blocks more, of 10 tensors each
        (1, "resnet18.pth", r"1 of .* \(conv1\.weight\)"),
    ],
)
def test_a_file_of_another_network_is_refused_and_nothing_loaded(channels, name, odd, files):
    model = ResNet18({"a": 2}, in_channels=channels, features=None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{name} does not hold .* of a resnet18: {odd}.*models\.resnet18"):
        load_resnet(model, files / name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_file_that_is_missing_or_holds_something_else(tmp_path):
    model = ResNet18({"a": 2}, in_channels=3, features=None)
    with pytest.raises(CheckpointError, match=r"There is no file .*nowhere\.pth"):
        load_resnet(model, tmp_path / "nowhere.pth")
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"whole\.pth cannot be read as a state dict"):
        load_resnet(model, tmp_path / "whole.pth")
