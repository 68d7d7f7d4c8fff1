import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from evaluation.explain.capture import captured_outputs, named_layers
from evaluation.explain.feature_map import as_map
from evaluation.explain.grad_cam import choose_layer, grad_cam, overlay
from train.models.residual_cnn import ResidualCnn


class Bright(nn.Module):
    """Class 0 is told by red, class 1 by green, by means over the image: the answer to Grad-CAM is known."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 2, 8, stride=8, bias=False), nn.BatchNorm2d(2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.features[0].weight.zero_()
            self.features[0].weight[0, 0] = self.features[0].weight[1, 1] = 1 / 64
            self.head.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def forward(self, images):
        return self.head(self.pool(self.features(images)).flatten(1))


@pytest.fixture
def red_and_green():
    """Two images: red at the upper left and green at the lower right, and the other way round."""
    images = torch.zeros(2, 3, 64, 64)
    images[0, 0, :16, :16] = images[1, 1, :16, :16] = 1
    images[0, 1, 48:, 48:] = images[1, 0, 48:, 48:] = 1
    return images


def peak(heat):
    return tuple(int(place) for place in np.unravel_index(heat.argmax(), heat.shape))


def test_the_map_lies_where_the_class_is(red_and_green):
    images = red_and_green[[0, 0, 1, 1]]
    maps = grad_cam(Bright(), images, torch.tensor([0, 1, 0, 1]))
    assert maps.shape == (4, 64, 64) and maps.dtype == np.float32
    for heat, is_upper_left in zip(maps, [True, False, False, True], strict=True):
        here, there = (heat[:16, :16], heat[48:, 48:]) if is_upper_left else (heat[48:, 48:], heat[:16, :16])
        assert heat.max() == 1 and here.max() == 1 and there.max() == 0
        assert heat.min() == 0 and heat[24:40, 24:40].max() == 0


def test_what_speaks_against_a_class_alone_gives_an_empty_map():
    green = torch.zeros(1, 3, 64, 64)
    green[:, 1, :16, :16] = 1
    heat = grad_cam(Bright(), green, torch.tensor([0]))
    assert not heat.any() and np.isfinite(heat).all()


def test_images_do_not_touch_each_other(red_and_green):
    model = Bright().train()
    together = grad_cam(model, red_and_green, torch.tensor([0, 1]))
    apart = [grad_cam(model, red_and_green[i : i + 1], torch.tensor([i]))[0] for i in (0, 1)]
    assert together == pytest.approx(np.stack(apart), abs=1e-6)


def test_the_model_is_left_as_it_was(red_and_green):
    model = Bright().train()
    model.features[1].eval()
    for parameter in model.features.parameters():
        parameter.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    images, state = red_and_green.clone(), {name: t.clone() for name, t in model.state_dict().items()}
    with torch.inference_mode():
        maps = grad_cam(model, images, torch.tensor([0, 1]))
        choose_layer(model, images)
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled()
    assert maps.max() == 1
    assert model.training and model.features.training and not model.features[1].training
    assert [p.requires_grad for p in model.parameters()] == [False] * 3 + [True]
    assert model.features[0].weight.grad is None and (model.head.weight.grad == 1).all()
    assert all((state[name] == t).all() for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert (images == red_and_green).all() and not images.requires_grad


def test_hooks_are_gone_after_an_error(red_and_green):
    model = Bright().train()
    model.head = nn.Linear(3, 2)  # of another width
    with pytest.raises(RuntimeError):
        grad_cam(model, red_and_green, torch.tensor([0, 1]))
    assert model.training and not any(module._forward_hooks for module in model.modules())


FAMILIES = {
    "residual_cnn": (lambda: ResidualCnn(4, [8, 8, 16, 16]), "blocks"),
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=4), "layer4"),
    "mobilenet": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=4), "blocks"),
    "convnext": (lambda: timm.create_model("convnext_atto", num_classes=4), "stages"),
    "torchvision resnet": (lambda: torchvision.models.resnet18(num_classes=4), "layer4"),
    "torchvision squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=4), "classifier.2"),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4),
        "blocks.1.norm1",
    ),
    "vit without class token": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=64, depth=2, num_classes=4, class_token=False, global_pool="avg"
        ),
        "blocks",
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, depths=(1, 1, 1, 1), num_classes=4
        ),
        "norm",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_a_map_of_the_last_layer_that_has_places(family):
    build, layer = FAMILIES[family]
    torch.manual_seed(0)
    model, images = build(), torch.randn(2, 3, 64, 64)
    assert choose_layer(model, images).startswith(layer)
    labels = torch.tensor([0, 3])
    maps = grad_cam(model, images, labels)
    assert maps.shape == (2, 64, 64) and maps.min() >= 0 and maps.max() <= 1
    assert set(maps.max(axis=(1, 2))) <= {0.0, 1.0}
    assert maps == pytest.approx(grad_cam(model, images, labels, choose_layer(model, images)))


def test_any_layer_can_be_named():
    torch.manual_seed(0)
    model, images = ResidualCnn(4, [8, 8, 16, 16]), torch.randn(1, 3, 64, 64)
    early = grad_cam(model, images, torch.tensor([1]), layer="blocks.0.conv1")
    late = grad_cam(model, images, torch.tensor([1]), layer="blocks.3")
    assert early.shape == late.shape and (early != late).any()


def test_a_layer_that_does_not_fit_is_a_sentence():
    model, images, labels = ResidualCnn(4, [8, 8, 16, 16]), torch.randn(1, 3, 64, 64), torch.tensor([0])
    with pytest.raises(ValueError, match=r"no layer 'blocks.3.conv9': did you mean .*blocks\.3\.conv"):
        grad_cam(model, images, labels, layer="blocks.3.conv9")
    with pytest.raises(ValueError, match="its parts are stem, blocks, pool, dropout, head"):
        grad_cam(model, images, labels, layer="∅" * 500)
    with pytest.raises(ValueError, match=r"'head' puts out \(1, 4\), which is no map"):
        grad_cam(model, images, labels, layer="head")
    with pytest.raises(ValueError, match=r"'pool' puts out \(1, 16, 1, 1\)"):
        grad_cam(model, images, labels, layer="pool")
    model.unused = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="takes no part"):
        grad_cam(model, images, labels, layer="unused")
    with pytest.raises(ValueError, match="Labels must be from 0 to 3"):
        grad_cam(model, images, torch.tensor([4]))
    with pytest.raises(ValueError, match="shape"):
        grad_cam(model, images, torch.tensor([0, 1]))


def test_a_network_without_places_is_a_sentence():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="no layer with a map of features at 16 × 16 pixels"):
        grad_cam(model, torch.randn(1, 3, 16, 16), torch.tensor([0]))


def test_tokens_are_laid_out_as_the_image():
    tokens = torch.arange(2 * 13 * 5).reshape(2, 13, 5).float()  # a class token and 3 × 4 places
    features = as_map(tokens, (48, 64))
    assert features.shape == (2, 5, 3, 4)
    assert (features[1, :, 2, 3] == tokens[1, 12]).all() and (features[0, :, 0, 1] == tokens[0, 2]).all()
    assert as_map(torch.zeros(1, 14, 5), (64, 64), 1) is None  # 13 are no square
    assert as_map(torch.zeros(1, 7, 7, 32), (64, 64)).shape == (1, 32, 7, 7)
    assert as_map(torch.zeros(1, 32, 7, 7), (64, 64)).shape == (1, 32, 7, 7)
    assert as_map(torch.zeros(1, 32), (64, 64)) is None


def test_outputs_are_captured_in_order():
    model = Bright()
    with captured_outputs(named_layers(model)) as outputs:
        logits = model(torch.zeros(1, 3, 16, 16))
    names = [name for name, _ in outputs]
    assert names == ["features.0", "features.1", "features.2", "features", "pool", "head"]
    assert outputs[-1][1] is logits


def test_an_overlay_is_brighter_where_the_map_is_high():
    image = np.full((8, 8, 3), 100, np.uint8)
    heat = np.zeros((8, 8), np.float32)
    heat[:4] = 1
    picture = overlay(image, heat)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert picture[:4].mean() > picture[4:].mean() + 50 and picture[4:].max() <= 55
    with pytest.raises(ValueError, match="does not fit"):
        overlay(image, heat[:4])
