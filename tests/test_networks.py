"""Networks for small images."""
import pytest
import torch

from zootwins.core import UserError
from zootwins.networks import NETWORKS, WideBlock, logits_of, make_network, parameter_count


@pytest.mark.parametrize(("name", "classes", "count"), [
    ("resnet8", 10, 19_954), ("resnet20", 10, 272_474), ("resnet18", 10, 11_173_962), ("resnet18", 100, 11_220_132),
    ("wrn20", 100, 26_855_604), ("wrn20", 10, 26_797_914),  # WRN-22-10 of Zagoruyko and Komodakis: 26.8 million
])
def test_networks_have_the_published_numbers_of_parameters(name, classes, count):
    with torch.device("meta"):
        assert parameter_count(NETWORKS[name](classes)) == count


def test_weights_depend_on_the_seed_alone_and_leave_other_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one = make_network("resnet8", seed=5)
    assert torch.equal(torch.rand(2), expected)
    torch.rand(7)
    assert torch.equal(one.conv.weight, make_network("resnet8", seed=5).conv.weight)


def test_shapes():
    for name in ("resnet8", "resnet20"):
        net = make_network(name, classes=7, channels=1).eval()
        assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert WideBlock(4, 8, 2)(torch.zeros(2, 4, 6, 6)).shape == (2, 8, 3, 3)


@pytest.mark.parametrize("what", [dict(name="resnet50"), dict(name="resnet8", classes=0)])
def test_what_cannot_be_built_is_said(what):
    with pytest.raises(UserError):
        make_network(**what)


def test_outputs_without_scores_are_refused():
    with pytest.raises(UserError, match="holds no class scores"):
        logits_of({"boxes": torch.zeros(2)})
    assert logits_of((torch.ones(1), "hidden")) == 1
