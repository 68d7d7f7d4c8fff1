"""What optimizers do to real models: who is decayed, who learns how fast, who does not learn at all."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from timm.utils.agc import unitwise_norm
from torch import nn

from train.clip import clip_gradients, total_grad_norm
from train.config import ClipSection, ConstantPhase, OptimizerSection
from train.optim import build_optimizer, optimizer_fault, scaled_peak_lr, set_learning_rate, set_peak_lr
from train.param_groups import build_groups, freeze_statistics, layer_depths, set_trainable, trainable_fault

torch.set_num_threads(1)
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def timm_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    # Blocks that begin as zero would have no gradients in the first step.
    options = {"zero_init_last": False} if name == "test_resnet" else {}
    return timm.create_model(name, num_classes=5, **options)


def decayed_names(model: nn.Module, **options) -> set[str]:
    groups = build_groups(model, OptimizerSection(weight_decay=0.1, **options))
    ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(IMAGES).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# Groups: decay


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_nfnet", "torchvision"])
def test_each_parameter_is_in_one_group_frozen_or_not(name: str) -> None:
    model = torchvision.models.resnet18(num_classes=5) if name == "torchvision" else timm_model(name)
    next(model.parameters()).requires_grad = False
    optimizer = build_optimizer(model, OptimizerSection(layer_decay=0.8))
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_resnets_decay_convolutions_and_the_head_only() -> None:
    for model in (timm_model("test_resnet"), torchvision.models.resnet18(num_classes=5)):
        convolutions = {
            f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)
        }
        assert decayed_names(model) == convolutions
        # The shortcut's BatchNorm, which `'bn' in name` misses.
        assert any("downsample.1" in name for name, _ in model.named_parameters()) or len(convolutions) < 15


def test_vit_leaves_norms_biases_embeddings_and_tokens() -> None:
    model = timm_model("test_vit")
    decayed = decayed_names(model)
    assert {"blocks.0.attn.qkv.weight", "head.weight", "patch_embed.proj.weight"} <= decayed
    assert not {"pos_embed", "cls_token"} & decayed
    assert not [name for name in decayed if "norm" in name or name.endswith("bias")]


def test_convnext_leaves_layer_scale_also_where_it_is_stored_in_three_dimensions() -> None:
    for model in (timm_model("test_convnext"), torchvision.models.convnext_tiny(num_classes=5)):
        decayed = decayed_names(model)
        assert not [n for n in decayed if n.endswith(("gamma", "layer_scale", "bias")) or ".norm." in n]
        assert any(parameter.ndim == 4 for name, parameter in model.named_parameters() if name in decayed)


def test_norms_of_timm_without_a_norm_of_torch_as_their_base() -> None:
    from timm.layers import EvoNorm2dS0, RmsNorm2d, SimpleNorm2d

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(RmsNorm2d(4), SimpleNorm2d(4), EvoNorm2dS0(4, groups=2))
            for layer in self.layers:  # by type: a shape that no vector has
                layer.weight = nn.Parameter(torch.ones(2, 2))
            self.single = nn.Linear(4, 1)  # by type again: a weight, though as long as a vector

    assert decayed_names(Odd()) == {"single.weight"}


def test_a_layer_with_one_input_and_all_on_demand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(9, 1))
    assert decayed_names(model) == {"0.weight", "3.weight"}
    assert decayed_names(model, decay_norms_and_biases=True) == {n for n, _ in model.named_parameters()}


def test_decay_moves_only_what_is_decayed() -> None:
    model = timm_model("test_resnet")
    optimizer = build_optimizer(model, OptimizerSection(weight_decay=0.5, peak_lr=0.1, momentum=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in decayed_names(model) else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


# Groups: rates


def test_rates_of_head_and_backbone() -> None:
    model = timm_model("test_resnet")
    config = OptimizerSection(backbone_lr_fraction=0.1, peak_lr=1.0)
    optimizer = build_optimizer(model, config, head=[model.fc])
    set_learning_rate(optimizer, 0.5, momentum=0.7)
    head = {id(p) for p in model.fc.parameters()}
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.7
        assert all((id(p) in head) == (group["lr"] == 0.5) for p in group["params"])
        assert group["lr"] == pytest.approx(0.5 * group["lr_scale"])
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.1, 1.0}
    with pytest.raises(ValueError, match="backbone_lr_fraction"):
        build_optimizer(model, config)


def test_layer_decay_falls_from_head_to_stem() -> None:
    model = timm_model("test_vit")
    groups = build_groups(model, OptimizerSection(layer_decay=0.5), head=[model.head])
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["head.weight"] == of["head.bias"] == 1.0
    assert of["blocks.5.norm1.weight"] == of["blocks.5.mlp.fc1.weight"] == 0.5
    assert of["blocks.0.norm1.weight"] == 0.5**6 and of["cls_token"] == 0.5**7


def test_layers_of_models_that_do_not_say_what_a_layer_is() -> None:
    model = torchvision.models.resnet18()
    depths = layer_depths(model)
    of = {name: depths[id(parameter)] for name, parameter in model.named_parameters()}
    assert of["fc.weight"] == 0 and of["layer4.1.bn2.bias"] == 1 and of["layer4.0.downsample.1.weight"] == 2
    assert of["bn1.weight"] == of["conv1.weight"] == 9
    transformer = torchvision.models.vit_b_16()
    depths = layer_depths(transformer)
    layers = [depths[id(layer.ln_1.weight)] for layer in transformer.encoder.layers]
    assert layers == list(range(12, 0, -1))


# Names and options


@pytest.mark.parametrize(
    "name",
    ["sgd", "nesterov", "momentum", "adam", "adamw", "lamb", "lion", "rmsprop", "lookahead_adamw", "muon"],
)
def test_optimizers_learn_leave_frozen_weights_and_take_up_their_state(name: str) -> None:
    model = timm_model("test_resnet")
    set_trainable(model, ("layer4", "fc"))
    config = OptimizerSection(name=name, peak_lr=1e-3, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_step(model, optimizer)
    for parameter_name, parameter in model.named_parameters():
        is_frozen = not parameter_name.startswith(("layer4.", "fc."))
        assert torch.equal(parameter, before[parameter_name]) == is_frozen, parameter_name
    again = build_optimizer(model, config)
    again.load_state_dict(optimizer.state_dict())
    set_learning_rate(again, 2e-3, 0.5)
    one_step(model, again)


def test_nesterov_is_what_the_recipe_says() -> None:
    def nesterov(**options) -> bool:
        return build_optimizer(nn.Linear(2, 2), OptimizerSection(**options)).param_groups[0]["nesterov"]

    assert not nesterov(name="sgd") and not nesterov(name="sgdw") and nesterov(name="sgd", nesterov=True)
    assert nesterov(name="nesterov") and not nesterov(name="sgd", nesterov=True, momentum=0.0)


def test_momentum_is_the_first_beta_and_the_others_stay() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSection(name="lion", momentum=0.95))
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.99)
    set_learning_rate(optimizer, 1.0, None)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.99)
    set_learning_rate(optimizer, 1.0, 0.8)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)


def test_options_reach_the_optimizer_and_the_fused_step_is_used() -> None:
    config = OptimizerSection(name="adamw", options={"eps": 1e-6, "betas": [0.9, 0.95]})
    group = build_optimizer(nn.Linear(2, 2), config, peak_lr=0.25).param_groups[0]
    assert (group["eps"], group["betas"], group["fused"], group["lr"]) == (1e-6, (0.9, 0.95), True, 0.25)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_steps_are_those_of_foreach(name: str) -> None:
    weights = []
    for options in ({}, {"foreach": True}):
        torch.manual_seed(0)
        # Without a bias before the norm: its gradient is rounding noise, which Adam would blow up.
        convolution = nn.Conv2d(3, 4, 3, bias=False)
        model = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 62 * 62, 2))
        config = OptimizerSection(name=name, peak_lr=0.01, weight_decay=0.1, nesterov=True, options=options)
        optimizer = build_optimizer(model, config)
        assert bool(optimizer.param_groups[0]["fused"]) == (not options)
        for _ in range(3):
            one_step(model, optimizer)
        weights.append(list(model.parameters()))
    for fused, foreach in zip(*weights, strict=True):
        torch.testing.assert_close(fused, foreach, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "adamv"}, r"no optimizer 'adamv'; did you mean .*adam"),
        ({"name": "foo_sgd"}, "no optimizer 'foo_sgd'"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "fusedadam"}, "apex, which is not installed"),
        ({"name": "adamw", "options": {"ep": 1e-6}}, "did you mean eps"),
        ({"name": "adamw", "options": {"eps": -1.0}}, "Invalid epsilon"),
        ({"name": "adamw", "options": {"eps": "small"}}, "check optimizer.options"),
        ({"name": "adamw", "options": {"betas": [0.8, 0.99]}}, "make them equal"),
        ({"name": "sgd", "options": {"lr": 1.0}}, "set optimizer.peak_lr instead"),
    ],
)
def test_faults_are_told_in_a_sentence(options: dict, sentence: str) -> None:
    config = OptimizerSection(**options)
    with pytest.raises(ValueError, match=sentence) as raised:
        build_optimizer(nn.Linear(2, 2), config)
    fault = optimizer_fault(config)
    assert fault == str(raised.value) and "\n" not in fault
    assert optimizer_fault(OptimizerSection(backbone_lr_fraction=0.5)) is None


def test_peak_lr_scales_with_the_batch() -> None:
    assert scaled_peak_lr(OptimizerSection(peak_lr=0.5, peak_lr_batch_size=256), 1024) == 2.0
    assert scaled_peak_lr(OptimizerSection(peak_lr=0.5), 1024) == 0.5


# Freezing


def test_head_only_then_all() -> None:
    model = timm_model("test_resnet")
    optimizer = build_optimizer(model, OptimizerSection(peak_lr=0.1))
    model(IMAGES).mean().backward()
    set_trainable(model, "head", [model.fc])
    assert all((p.grad is None) == (not n.startswith("fc.")) for n, p in model.named_parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    freeze_statistics(model)
    one_step(model, optimizer)
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}
    set_trainable(model, "all")
    model.train()
    freeze_statistics(model)
    one_step(model, optimizer)
    assert not torch.equal(model.conv1[0].weight, before["conv1.0.weight"])
    assert not torch.equal(model.state_dict()["bn1.running_mean"], before["bn1.running_mean"])


def test_statistics_of_what_learns_go_on() -> None:
    model = timm_model("test_resnet")
    set_trainable(model, ("layer4.0", "fc"))
    model.train()
    freeze_statistics(model)
    assert model.layer4[0].bn1.training and not model.layer3[0].bn1.training


@pytest.mark.parametrize(("frozen", "is_training"), [((), True), (("0",), False), (("1.weight",), True)])
def test_statistics_stay_only_where_all_is_frozen(frozen: tuple[str, ...], is_training: bool) -> None:
    # Without parameters of its own a BatchNorm goes with the layers beside it.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine="1.weight" in frozen))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(frozen) if frozen else True
    model.train()
    freeze_statistics(model)
    assert model[1].training == is_training


def test_wrong_module_names() -> None:
    model = timm_model("test_resnet")
    with pytest.raises(ValueError, match="no module 'layr4'; did you mean layer4"):
        set_trainable(model, ("layr4",))
    with pytest.raises(ValueError, match="no head"):
        set_trainable(model, "head")
    with pytest.raises(ValueError, match="has no parameters"):
        set_trainable(model, ("global_pool",))
    assert all(parameter.requires_grad for parameter in model.parameters())
    phases = [ConstantPhase(epochs=1), ConstantPhase(epochs=1, trainable=("fd",))]
    assert "schedule.phases.1.trainable" in (trainable_fault(model, [model.fc], phases) or "")
    assert trainable_fault(model, [model.fc], [ConstantPhase(epochs=1, trainable="head")]) is None


# Clipping


def with_gradients() -> list[nn.Parameter]:
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(4, 3, 2, 2)),
        nn.Parameter(torch.randn(5)),
        nn.Parameter(torch.ones(2)),
    ]
    for parameter in parameters[:2]:
        parameter.grad = 3 * torch.randn_like(parameter)
    return parameters


def flat(parameters: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_total_norm_is_that_of_one_long_vector() -> None:
    parameters = with_gradients()
    norm = total_grad_norm(parameters)
    assert norm.shape == () and norm == pytest.approx(flat(parameters).norm().item())
    assert total_grad_norm([parameters[2]]) == 0


@pytest.mark.parametrize("known", [False, True])
def test_clipping_bounds_the_norm_and_keeps_the_direction(known: bool) -> None:
    parameters = with_gradients()
    before = flat(parameters)
    norm = total_grad_norm(parameters) if known else None
    clip_gradients(parameters, ClipSection(kind="norm", limit=0.5), total_norm=norm)
    after = flat(parameters)
    assert after.norm() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
    clip_gradients(parameters, ClipSection(kind="norm", limit=100.0))
    assert torch.equal(flat(parameters), after)


def test_clipping_by_value() -> None:
    parameters = with_gradients()
    before = flat(parameters)
    clip_gradients(parameters, ClipSection(kind="value", limit=0.25))
    assert torch.equal(flat(parameters), before.clamp(-0.25, 0.25))


def test_agc_is_its_formula_and_leaves_the_head() -> None:
    parameters = with_gradients()
    weight, head = parameters[:2]
    gradient, head_gradient = weight.grad.clone(), head.grad.clone()
    gradient[0] *= 1e-4  # a unit within its limit
    weight.grad = gradient.clone()
    clip_gradients(parameters, ClipSection(kind="agc", limit=0.1), head_parameters=[head])
    limit = 0.1 * unitwise_norm(weight.detach()).clamp(min=1e-3)
    norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = torch.where(norm > limit, gradient * limit / norm, gradient)
    torch.testing.assert_close(weight.grad, expected)
    assert torch.equal(weight.grad[0], gradient[0]) and not torch.equal(weight.grad[1], gradient[1])
    assert torch.equal(head.grad, head_gradient)


def test_a_peak_found_later_is_what_adamc_decays_by() -> None:
    """AdamC decays by rate / peak: another peak would wipe the weights out."""
    norms = []
    for made_for, found in ((0.1, None), (0.001, 0.1)):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        config = OptimizerSection(name="adamc", peak_lr=made_for, weight_decay=0.01)
        optimizer = build_optimizer(model, config)
        if found is not None:
            set_peak_lr(optimizer, found)
        for _ in range(20):
            set_learning_rate(optimizer, 0.1, None)
            model.weight.grad = torch.zeros_like(model.weight)
            optimizer.step()
        norms.append(float(model.weight.detach().norm()))
    assert norms[0] == pytest.approx(norms[1])
