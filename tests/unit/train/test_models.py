"""Models: what each setting of the recipe's section changes in the network."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_builder, list_models
from torchvision.models import resnet as torchvision_resnet
from torchvision.ops import StochasticDepth

from tests.conftest import ROOT
from train.config import HeadSection, ModelSection
from train.models.blurpool import BlurBefore, binomial_kernel, blur
from train.models.build import build_model, model_fault, num_parameters
from train.models.heads import Head, final_layer, head_of, init_bce_bias, replace_heads, split_outputs

torch.set_num_threads(1)

SMALL = [("timm", "test_resnet"), ("torchvision", "resnet18"), ("own", "residual_cnn")]


def section(library: str, name: str, **changes: Any) -> ModelSection:
    return ModelSection.model_validate({"library": library, "name": name, **changes})


def build(library: str, name: str, num_classes: int = 7, **changes: Any) -> Any:
    torch.manual_seed(0)
    return build_model(section(library, name, **changes), num_classes)


def images(side: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


# Names, options, outputs


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"library": "own", "name": "residual_cn"}, "there is residual_cnn"),
        ({"library": "own", "name": "residual_cnn", "pretrained": True}, "no pretrained weights"),
        ({"name": "resnet10t", "activation": "leaky_rely"}, "did you mean leaky_relu"),
        (
            {"name": "resnet10t", "head": {"activation": "gelo"}},
            r"model\.head\.activation.*did you mean gelu",
        ),
        ({"name": "resnet10t", "head": {}, "dropout": 0.2}, r"say model\.head\.dropout"),
        ({"name": "resnet10t", "pretrained": True, "zero_init_last_norm": True}, "leave it null"),
    ],
)
def test_faults_are_told_without_building(changes: dict[str, Any], sentence: str) -> None:
    config = ModelSection.model_validate(changes)
    with pytest.raises(ValueError, match=sentence):
        build_model(config, 7)
    assert model_fault(config)


@pytest.mark.parametrize(("library", "name"), [*SMALL, ("torchvision", "mobilenet_v3_small")])
def test_an_option_that_the_constructor_does_not_take_is_named(library: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.options: .*takes no option 'colour'"):
        build(library, name, options={"colour": 3})
    with pytest.raises(ValueError, match="num_classes has a place of its own"):
        build(library, name, options={"num_classes": 3})


def test_options_reach_the_constructor() -> None:
    assert build("timm", "test_resnet", options={"stem_width": 8}).conv1[0].out_channels == 8
    assert (
        build("torchvision", "resnet18", options={"width_per_group": 64}).layer1[0].conv1.out_channels == 64
    )
    assert (
        build("torchvision", "mobilenet_v3_small", options={"width_mult": 0.5}).features[0][0].out_channels
        == 8
    )
    assert build("own", "residual_cnn", options={"widths": [8, 8, 16, 24]}).head.in_features == 24


@pytest.mark.parametrize("shortcut", ["projection", "pool"])
@pytest.mark.parametrize("side", [32, 45])
def test_own_network_keeps_the_identity_path(shortcut: str, side: int) -> None:
    model = build("own", "residual_cnn", options={"widths": [8, 16, 24, 32], "shortcut": shortcut})
    assert model(images(side)).shape == (2, 7) and len(model.blocks) == 4
    block = model.blocks[1].eval()
    nn.init.zeros_(block.bn2.weight)  # the residual branch is silent
    features = torch.rand(2, 8, 9, 9)
    out = block(features)
    assert out.shape == (2, 16, 5, 5)
    if shortcut == "pool":
        torch.testing.assert_close(out[:, :8], F.avg_pool2d(features, 2, ceil_mode=True))
        assert not out[:, 8:].any()
    else:
        torch.testing.assert_close(out, F.relu(block.shortcut(features)))


@pytest.mark.parametrize(
    "options",
    [{"widths": [1, 2]}, {"widths": "abcd"}, {"stem_stride": 3}, {"shortcut": "none"},
     {"shortcut": "pool", "widths": [8, 4, 8, 8]}],
)  # fmt: skip
def test_own_network_refuses_what_makes_no_network(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.options"):
        build("own", "residual_cnn", options=options)


@pytest.mark.parametrize(("name", "num_auxiliary", "side"), [("inception_v3", 1, 299), ("googlenet", 2, 64)])
def test_auxiliary_heads_have_the_classes_and_speak_in_training(
    name: str, num_auxiliary: int, side: int
) -> None:
    model = build("torchvision", name, options={"init_weights": False})
    logits, auxiliary = split_outputs(model.train()(images(side)))
    assert logits.shape == (2, 7) and [one.shape for one in auxiliary] == [(2, 7)] * num_auxiliary
    assert len(head_of(model)) == 1 + num_auxiliary
    logits, auxiliary = split_outputs(model.eval()(images(75)))
    assert logits.shape == (2, 7) and auxiliary == []


def test_split_outputs_skips_none_and_refuses_others() -> None:
    logits = torch.zeros(2, 7)
    assert split_outputs((logits, None)) == (logits, [])
    with pytest.raises(ValueError, match="dict"):
        split_outputs({"logits": logits})


# Heads


def test_head_of_finds_the_last_layers_of_torchvision_models() -> None:
    # RegNets compute their widths, which takes real tensors; their head is a ResNet's.
    families = {get_model_builder(name).__module__: name for name in list_models(torchvision.models)}
    families.pop("torchvision.models.regnet")
    assert len(families) > 14
    for name in [*families.values(), "wide_resnet50_2"]:
        options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        with torch.device("meta"):
            model = get_model(name, num_classes=7, **options)
        wanted = {m for m in model.modules() if has_outputs(m, 7)}
        assert {final_layer(head) for head in head_of(model)} == wanted, name
        replace_heads(model, 5, HeadSection(hidden=(6,)))
        assert isinstance(head_of(model)[0], Head), name
        assert all(has_outputs(final_layer(head), 5) for head in head_of(model)), name


def has_outputs(layer: nn.Module, count: int) -> bool:
    return count in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None))


@pytest.mark.parametrize("name", ["levit_128s", "crossvit_tiny_240", "repvit_m0_9"])
def test_all_heads_of_timms_distilled_and_branched_models_are_replaced(name: str) -> None:
    model = build("timm", name, num_classes=11, head={"hidden": [6]})
    assert len(head_of(model)) == 2
    assert not any(head.in_features == 0 or head.in_features != 6 for head in model.modules()
                   if isinstance(head, nn.Linear) and head.out_features == 11)  # fmt: skip
    assert model.eval()(images(240 if name.startswith("crossvit") else 224, 1)).shape == (1, 11)


@pytest.mark.parametrize(
    ("library", "name"),
    [*SMALL, ("timm", "test_vit"), ("timm", "test_convnext"), ("torchvision", "squeezenet1_1")],
)
def test_head_has_layers_activation_and_dropout_of_the_recipe(library: str, name: str) -> None:
    head = {"hidden": [12, 9], "activation": "gelu", "dropout": 0.5}
    model = build(library, name, head=head)
    linear = "Conv2d" if name == "squeezenet1_1" else "Linear"
    (built,) = head_of(model)
    kinds = ["Dropout", linear, "GELU", "Dropout", linear, "GELU", "Dropout", linear]
    assert [type(layer).__name__ for layer in built] == kinds
    assert [layer.p for layer in built if isinstance(layer, nn.Dropout)] == [0.5] * 3
    assert [layer.weight.shape[0] for layer in built if type(layer).__name__ == linear] == [12, 9, 7]
    side = 160 if name in ("test_vit", "test_convnext") else 64
    assert model.eval()(images(side)).shape == (2, 7)


@pytest.mark.parametrize(("library", "name"), SMALL)
def test_bce_bias_begins_at_one_over_the_classes(library: str, name: str) -> None:
    for head in (None, {"hidden": [5]}):
        model = build(library, name, head=head)
        init_bce_bias(model, 7)
        final_layer(head_of(model)[0]).weight.data.zero_()
        assert model.eval()(images()).sigmoid().sum(1).detach() == pytest.approx(
            7 / 8, abs=1e-5
        )  # 1/(1+7) each
        assert final_layer(head_of(model)[0]).bias[0].item() == pytest.approx(-math.log(7))


def test_pretrained_torchvision_heads_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    untrained = torchvision.models.get_model
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: untrained(name))
    monkeypatch.setattr("train.models.hub.answers", lambda *arguments: True)
    model = build("torchvision", "resnet18", pretrained=True, activation="silu", head={"hidden": [4]})
    assert model(images()).shape == (2, 7) and isinstance(model.fc, Head)
    assert build("torchvision", "squeezenet1_1", pretrained=True)(images(64)).shape == (2, 7)


# Activation


def activations(model: nn.Module) -> set[str]:
    kinds = (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ReLU6)
    return {type(module).__name__ for module in model.modules() if isinstance(module, kinds)}


@pytest.mark.parametrize(
    ("library", "name"),
    [*SMALL, ("timm", "test_efficientnet"), ("timm", "test_vit"), ("torchvision", "mobilenet_v3_small")],
)
def test_every_activation_is_swapped(library: str, name: str) -> None:
    model = build(library, name, activation="leaky_relu")
    assert activations(model) == {"LeakyReLU"}
    side = 160 if name == "test_vit" else 32
    output = model.train()(images(side))
    output.square().sum().backward()  # overwriting was safe
    assert not torch.equal(output, build(library, name).train()(images(side)))


def test_fused_batchnorm_of_timm_computes_the_new_activation() -> None:
    from timm.layers import BatchNormAct2d

    model = build("timm", "test_efficientnet", activation="softplus", channels_last=False)
    fused = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    norm = next(m for m in fused if isinstance(m.act, nn.Softplus)).eval()
    features = torch.randn(2, norm.num_features, 4, 4)
    plain = F.batch_norm(features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    torch.testing.assert_close(norm(features), F.softplus(plain))


@pytest.mark.parametrize(("name", "side"), [("inception_v3", 75), ("googlenet", 64), ("densenet121", 32)])
def test_torchvision_models_that_call_relu_as_a_function(name: str, side: int) -> None:
    options = {} if name == "densenet121" else {"init_weights": False}
    plain = build("torchvision", name, options=options).eval()
    same = build("torchvision", name, options=options, activation="relu").eval()
    other = build("torchvision", name, options=options, activation="leaky_relu").eval()
    assert plain.state_dict().keys() == same.state_dict().keys() == other.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(plain(images(side)), same(images(side)))
        slopes = [m for m in other.modules() if isinstance(m, nn.LeakyReLU)]
        assert len(slopes) >= 57 and not torch.equal(plain(images(side)), other(images(side)))
        calls: list[nn.Module] = []
        for slope in slopes:
            slope.register_forward_hook(lambda module, *_: calls.append(module))
        other.train()(images(299 if name == "inception_v3" else side))  # what its auxiliary head needs
        assert set(calls) == set(slopes)  # auxiliary heads included


def test_functions_that_cannot_be_swapped_are_refused() -> None:
    with pytest.raises(ValueError, match="calls its activation as a function"):
        build("timm", "nasnetalarge", activation="gelu")
    with pytest.raises(ValueError, match="calls its activation as a function"):
        build("timm", "dm_nfnet_f0", activation="gelu")


# Dropout and stochastic depth


@pytest.mark.parametrize(
    ("library", "name"),
    [
        *SMALL,
        ("torchvision", "mobilenet_v3_small"),
        ("torchvision", "densenet121"),
        ("torchvision", "alexnet"),
    ],
)
def test_dropout_makes_training_random_before_the_last_layer(library: str, name: str) -> None:
    model = build(library, name, dropout=0.6)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {0.6}
    assert model.state_dict().keys() == build(library, name).state_dict().keys()
    last = final_layer(head_of(model)[0])
    seen: list[torch.Tensor] = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    side = 64 if name in ("alexnet", "mobilenet_v3_small") else 32
    with torch.no_grad():
        model(images(side))
        model(images(side))
        assert not torch.equal(seen[0], seen[1])
        model.eval()
        assert torch.equal(model(images(side)), model(images(side)))


@pytest.mark.parametrize(("library", "name"), [*SMALL, ("torchvision", "efficientnet_b0")])
def test_stochastic_depth_drops_whole_branches_in_training_only(library: str, name: str) -> None:
    changes = {} if name == "efficientnet_b0" else {"zero_init_last_norm": False}  # timm begins with 0
    model = build(library, name, stochastic_depth=0.9, **changes)
    plain = build(library, name, **changes)
    assert model.state_dict().keys() == plain.state_dict().keys()
    side = 64 if name == "efficientnet_b0" else 32
    with torch.no_grad():
        assert torch.equal(model.eval()(images(side)), plain.eval()(images(side)))
        model.train(), plain.train()
        first, second = model(images(side, 8)), model(images(side, 8))
        assert not torch.equal(first, second)


def test_stochastic_depth_rises_to_the_last_block_and_keeps_the_expectation() -> None:
    model = build("torchvision", "resnet18", stochastic_depth=0.7)
    blocks = [m for m in model.modules() if isinstance(m, torchvision_resnet.BasicBlock)]
    assert [round(block.drop_probability, 3) for block in blocks] == [round(0.1 * i, 3) for i in range(8)]
    block = blocks[-1]
    block.relu = nn.Identity()
    nn.init.ones_(block.bn2.weight)
    features = torch.randn(1, 512, 2, 2).expand(400, -1, -1, -1)
    with torch.no_grad():
        residual = block(features) - features
    kept = residual.flatten(1).abs().amax(1) > 0
    assert 0.2 < kept.float().mean() < 0.4  # by image, 30 % of them
    rates = [
        m.p
        for m in build("own", "residual_cnn", stochastic_depth=0.3).modules()
        if type(m) is StochasticDepth
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(("library", "name"), [("torchvision", "squeezenet1_1"), ("timm", "lcnetv2_base")])
def test_stochastic_depth_needs_residual_branches(library: str, name: str) -> None:
    with pytest.raises(ValueError, match=r"model\.stochastic_depth: "):
        build(library, name, stochastic_depth=0.1)


# BlurPool, norms


@pytest.mark.parametrize(("library", "name"), [*SMALL, ("torchvision", "mobilenet_v3_small")])
def test_blurpool_is_the_convolution_of_the_blurred_image(library: str, name: str) -> None:
    model, plain = build(library, name, blurpool=True), build(library, name)
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.load_state_dict(plain.state_dict())
    blurred = [m for m in model.modules() if isinstance(m, BlurBefore)]
    strided = [
        m for m in plain.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and m.in_channels >= 16
    ]
    assert len(blurred) == len(strided) > 0
    assert (
        type(model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))))
        is nn.Conv2d
    )
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for before, after in zip(strided, blurred, strict=True):
        features = torch.randn(2, before.in_channels, 9, 9)
        by_channel = F.conv2d(features.flatten(0, 1)[:, None], kernel[None, None], padding=1)
        torch.testing.assert_close(after(features), before(by_channel.view_as(features)))
    assert model(images()).shape == (2, 7)


def test_blur_keeps_the_mean_and_removes_the_highest_frequency() -> None:
    columns = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 16, 8, 8)
    out = blur(torch.cat([columns, torch.ones(1, 16, 8, 8)]), binomial_kernel())
    inside = out[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside[0], torch.zeros(16, 6, 6))
    torch.testing.assert_close(inside[1], torch.ones(16, 6, 6))


def test_blurpool_needs_a_strided_convolution() -> None:
    with pytest.raises(ValueError, match=r"model\.blurpool: the model has no strided convolution"):
        build("torchvision", "squeezenet1_1", blurpool=True)


@pytest.mark.parametrize(("library", "name"), [*SMALL, ("timm", "resnet26d"), ("torchvision", "resnet50")])
def test_zeroed_norms_make_every_block_the_identity(library: str, name: str) -> None:
    model = build(library, name, zero_init_last_norm=True).eval()
    blocks = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck", "ResidualBlock")]
    plain = [
        m for m in build(library, name, zero_init_last_norm=False).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in plain)
    zeroed = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]
    assert len(zeroed) == len(blocks) > 0
    last = [getattr(block, "bn3" if type(block).__name__ == "Bottleneck" else "bn2") for block in blocks]
    assert {id(norm) for norm in zeroed} == {id(norm) for norm in last}
    others = build(library, name).state_dict()  # left as the library has them
    assert all(v.ndim == 1 or torch.equal(v, others[k]) for k, v in model.state_dict().items())
    for block in blocks:
        path = getattr(block, "downsample", None) or getattr(block, "shortcut", None) or nn.Identity()
        convolution = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        features = torch.randn(1, convolution.in_channels, 8, 8)
        torch.testing.assert_close(block(features), F.relu(path(features)))


def test_zeroed_norms_need_residual_blocks() -> None:
    with pytest.raises(ValueError, match=r"model\.zero_init_last_norm: SqueezeNet has no residual block"):
        build("torchvision", "squeezenet1_1", zero_init_last_norm=True)


def test_counts_parameters_and_says_that_weights_are_random() -> None:
    model = build("torchvision", "resnet18", num_classes=1000)
    assert num_parameters(model) == 11_689_512 and model.weights_note == "random weights"


NARROW = """
import torch
from train.config import ModelSection
from train.models.build import build_model

model = build_model(ModelSection(library="own", name="residual_cnn", options={"widths": [4, 4, 8, 8]}), 3)
images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
model(images).square().mean().backward()
"""


def test_narrow_strided_convolutions_keep_out_of_a_kernel_that_hangs() -> None:
    """oneDNN's gradient of theirs in channels-last order writes behind its workspace (see narrow_convs)."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env={**os.environ, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    seen = [line for line in done.stdout.splitlines() if re.search(r"backward_weights.*kh1sh[2-9]", line)]
    faulty = [line for line in seen if re.search(r"_ic([1-9]|1[0-5])oc", line) and "blocked:acdb" in line]
    assert faulty == []
    if "onednn_verbose" in done.stdout:
        assert len(seen) >= 2, "its shortcuts are such convolutions"
