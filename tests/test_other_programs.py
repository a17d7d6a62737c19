"""What public programs do with the published repositories, each as a small test of our own.

Every program is a function of a model. It runs on a copy of our model, loaded with `AutoModel` or
`AutoModelForImageClassification` from a folder as the published ones are, and on the published package under the same
weights, and must give the same numbers on both.
"""

import copy
import json
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SMALL, copy_code
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from weights import filled, image


# Two random draws would differ between the two models: no stochastic depth.
SETTINGS = {**SMALL, "drop_path_rate": 0.0}
CLASSES = SETTINGS.pop("num_labels")
WIDTHS = [16, 32, 64, 128]


def hub_backbone(published, **settings):
    """The published package's model, with the two methods that its repositories on the Hub have changed.

    There a stage gives its map beside the next stage's input, and `forward_features` the four maps beside the pooled
    features; the package has neither. All arithmetic stays the package's.
    """
    package = published.MambaVision(**settings)

    class Stage(type(package.levels[0])):
        def forward(self, x):
            downsample, self.downsample = self.downsample, None
            stage_map = super().forward(x)
            self.downsample = downsample
            return (stage_map if downsample is None else downsample(stage_map)), stage_map

    class Backbone(type(package)):
        def forward_features(self, x):
            x, maps = self.patch_embed(x), []
            for level in self.levels:
                x, stage_map = level(x)
                maps.append(stage_map)
            return torch.flatten(self.avgpool(self.norm(x)), 1), maps

        def forward(self, x):
            return self.head(self.forward_features(x)[0])

    package.__class__ = Backbone
    for level in package.levels:
        level.__class__ = Stage
    return package


class PublishedModel(nn.Module):
    """Around the published backbone, what the published repositories' `AutoModel` class does."""

    def __init__(self, backbone):
        super().__init__()
        self.model = backbone

    def forward(self, pixel_values):
        return self.model.forward_features(pixel_values)


class PublishedClassifier(PublishedModel):
    """The same for `AutoModelForImageClassification`."""

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.cross_entropy(logits, labels)}


@pytest.fixture(scope="module")
def backbone(published):
    """The published model, small, with deterministic weights."""
    model = hub_backbone(published, **SETTINGS, mlp_ratio=4, num_classes=CLASSES)
    model.load_state_dict(filled({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model.eval()


@pytest.fixture(scope="module")
def folder(backbone, tmp_path_factory):
    """A folder as the published repositories are, with the weights of `backbone` and our code."""
    folder = copy_code(tmp_path_factory.mktemp("nvidia") / "MambaVision-Small")
    config = {
        "architectures": ["MambaVision"],
        "auto_map": {
            "AutoConfig": "configuration_mambavision.MambaVisionConfig",
            "AutoModel": "modeling_mambavision.MambaVisionModel",
            "AutoModelForImageClassification": "modeling_mambavision.MambaVisionModelForImageClassification",
        },
        "model_type": "mambavision",
        "torch_dtype": "float32",
        "id2label": {i: f"class {i}" for i in range(CLASSES)},
        **SETTINGS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(folder, backbone):
    """Ours and the published feature extractor."""
    return AutoModel.from_pretrained(folder, trust_remote_code=True), PublishedModel(backbone).eval()


@pytest.fixture(scope="module")
def classifiers(folder, backbone):
    """Ours and the published classifier."""
    ours = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    return ours, PublishedClassifier(backbone).eval()


def agree(program, models):
    """Run the program on a copy of each model, and compare all that it gives."""
    ours, theirs = (program(copy.deepcopy(model)) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


X = image((2, 3, 64, 96))
LABELS = torch.tensor([1, 3])


# ---------------------------------------------------------------------------------------------------------------------
# Taking features out of the outputs
# ---------------------------------------------------------------------------------------------------------------------


def test_descriptor_for_retrieval(models):
    """Place recognition: unpacks the output and compares images by their normalised pooled features."""

    def program(model):
        pooled, _ = model(X)
        descriptor = F.normalize(pooled, p=2, dim=1)
        return descriptor @ descriptor.T

    agree(program, models)


def test_unet_decoder(models):
    """Segmentation: a decoder with skip connections on the four maps, trained together with the backbone."""

    class Decoder(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = encoder
            self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in WIDTHS)
            self.predict = nn.Conv2d(8, 1, 1)

        def forward(self, x):
            _, features = self.encoder(x)
            y = self.lateral[3](features[3])
            for i in (2, 1, 0):
                y = self.lateral[i](features[i]) + F.interpolate(y, size=features[i].shape[-2:], mode="bilinear")
            return F.interpolate(self.predict(y), size=x.shape[-2:], mode="bilinear")

    def program(encoder):
        model = Decoder(encoder).train()
        mask = (X[:, :1] > 0).float()
        F.binary_cross_entropy_with_logits(model(X), mask).backward()
        return encoder.model.patch_embed.conv_down[0].weight.grad

    agree(program, models)


EDITS = {
    "zeros": torch.zeros_like,
    "halves": lambda output: 0.5 * output,
    "adds": lambda output: output + 1,
    "keeps": lambda output: output.new_ones(output.shape),
}


@pytest.mark.parametrize("edit", [*EDITS, None])
@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_hooks_on_the_layers_of_a_mixer(models, layer, edit):
    """Ablation, activation patching and captum: a hook sees a layer's result once, and may give another."""

    def program(model):
        seen, mixer = [], model.model.levels[2].blocks[0].mixer

        def hook(module, args, output):
            seen.append(output.flatten(0, -2))  # the published mixer flattens for some layers itself
            return EDITS[edit](output) if edit else None

        getattr(mixer, layer).register_forward_hook(hook)
        with torch.no_grad():
            pooled, _ = model(X)
        assert len(seen) == 1
        return pooled, seen[0]

    agree(program, models)


def test_maps_by_index(models):
    """mmsegmentation and captioning wrappers: `model(x)[1]` are the maps, `[0]` the pooled features."""

    def program(model):
        out = model(X)
        return out[0], [out[1][i] for i in range(4)], out[1][-1], len(out[1])

    agree(program, models)


def test_maps_as_the_last_of_two_parts(models):
    """Wrappers that take `out[-1]` for the maps, or go by the number of parts."""

    def program(model):
        out = model(X)
        assert len(out) == 2
        return list(out[-1])

    agree(program, models)


def test_plain_tuple_on_request(folder, models):
    """The same program, where the model is loaded with `return_dict=False`."""
    plain = AutoModel.from_pretrained(folder, trust_remote_code=True, return_dict=False)
    out = plain(X)
    assert type(out) is tuple and len(out) == 2 and type(out[1]) is list
    torch.testing.assert_close(out, models[1](X), rtol=1e-4, atol=1e-4)


def test_maps_probed_by_a_detector(models):
    """mmdetection: tries `output_hidden_states=True`, falls back where it is a TypeError, looks for `hidden_states`."""

    def program(model):
        try:
            out = model(X, output_hidden_states=True)
        except TypeError:
            out = model(X)
        maps = out.hidden_states if getattr(out, "hidden_states", None) is not None else out[1]
        assert [x.shape[1] for x in maps] == WIDTHS
        return list(maps)

    agree(program, models)


def test_all_maps_flattened(models):
    """Gesture recognition from radar: the four maps flattened and concatenated for a second head."""
    agree(lambda model: torch.cat([x.flatten(1) for x in model(X)[1]], dim=1), models)


def test_tokens_of_the_last_map(models):
    """Slot attention: the last map as (B, H * W, C) tokens, in float32 inside an autocast region."""

    def program(model):
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            _, features = model(X.float())
        B, C, H, W = features[-1].shape
        return features[-1].permute(0, 2, 3, 1).reshape(B, H * W, C)

    agree(program, models)


def test_bare_backbone_like_timm(models):
    """Programs that keep `model.model` alone and call `forward_features` as of a timm model."""
    agree(lambda model: model.model.forward_features(X), models)


def test_logits_by_key(classifiers):
    """Classification wrappers: `out["logits"]`, and the label's name from the configuration."""

    def program(model):
        return torch.softmax(model(X)["logits"], dim=-1)

    agree(program, classifiers)
    out = classifiers[0](X)
    assert out.logits is out["logits"] and out[0] is out["logits"] and isinstance(out, dict)
    assert classifiers[0].config.id2label[out.logits[0].argmax().item()].startswith("class ")


def test_loss_from_labels(classifiers):
    """Training loops that give the labels to the model, by position or by name, and use `out["loss"]`."""

    def program(model):
        model.train()
        loss = model(X, LABELS)["loss"]
        assert loss.isfinite() and model(X, labels=LABELS)["logits"].shape == (2, CLASSES)
        loss.backward()
        return loss.detach(), model.model.patch_embed.conv_down[0].weight.grad

    agree(program, classifiers)


# ---------------------------------------------------------------------------------------------------------------------
# Inside the backbone
# ---------------------------------------------------------------------------------------------------------------------


def test_stages_by_hand(models):
    """Programs with their own forward: stem, then each stage as `x, stage_map = level(x)`, then the norm."""

    def program(model):
        x, maps = model.model.patch_embed(X), []
        for level in model.model.levels:
            x, stage_map = level(x)
            maps.append(stage_map)
        x = model.model.norm(x)
        pooled = x.mean((2, 3))
        torch.testing.assert_close([pooled, maps], list(model(X)), rtol=1e-5, atol=1e-5)
        return pooled, maps

    agree(program, models)


def test_pooling_by_hand(models):
    """The same, ended as the published code names it: `avgpool`, then flattened."""

    def program(model):
        _, maps = model(X)
        return torch.flatten(model.model.avgpool(model.model.norm(maps[3])), 1)

    agree(program, models)


def test_features_fused_between_stages(models):
    """Salient objects: runs the blocks of the convolution stages, adds its own features, then calls `downsample`."""

    def program(model):
        x = model.model.patch_embed(X)
        for level in model.model.levels[:2]:
            for block in level.blocks:
                x = block(x)
            x = level.downsample(x + 0.1 * x.mean((2, 3), keepdim=True))
        return x

    agree(program, models)


def test_checkpointing_by_hand(models):
    """mmdetection: saves memory with one `checkpoint` around each stage."""

    def program(model):
        x, maps = model.model.patch_embed(X), []
        for level in model.model.levels:
            x, stage_map = checkpoint(level, x, use_reentrant=False)
            maps.append(stage_map)
        sum(m.square().mean() for m in maps).backward()
        return model.model.levels[2].blocks[0].mixer.in_proj.weight.grad

    agree(program, models)


def test_stage_replaced_by_a_module_with_its_blocks(models):
    """Windows of another shape: a module that takes a stage's blocks, `downsample` and kind over, in its place."""

    class Strips(nn.Module):
        """Windows of one row."""

        def __init__(self, stage):
            super().__init__()
            assert stage.transformer_block and not stage.conv and stage.window_size == 4
            self.blocks, self.downsample = stage.blocks, stage.downsample

        def forward(self, x):
            B, C, H, W = x.shape
            tokens = x.permute(0, 2, 3, 1).reshape(B * H, W, C)
            for block in self.blocks:
                tokens = block(tokens)
            x = tokens.reshape(B, H, W, C).permute(0, 3, 1, 2)
            return self.downsample(x), x

    def program(model):
        assert not model.model.levels[0].transformer_block and model.model.levels[0].conv
        model.model.levels[2] = Strips(model.model.levels[2])
        return model(X)[0]

    agree(program, models)


def test_kinds_of_blocks(models):
    """Sparse autoencoders on activations: list all blocks, and read their width from their modules."""

    def program(model):
        blocks = nn.ModuleList(block for level in model.model.levels for block in level.blocks)
        widths = [
            block.norm2.num_features if hasattr(block, "conv1") else block.mlp.fc2.out_features for block in blocks
        ]
        seen = {}
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda module, args, output, i=i: seen.update({i: output.detach()}))
        model(X)
        return torch.tensor(widths), [seen[i].mean() for i in range(len(blocks))], seen[2].shape

    agree(program, models)


def test_mixers_by_class_name(models):
    """Analyses that find mixers by the name of their class and probe the reach of each by gradients."""

    def program(model):
        found = []
        for name, module in model.named_modules():
            if "levels.2" in name and type(module).__name__ in ("MambaVisionMixer", "Attention"):
                kept = {}
                handle = module.register_forward_hook(
                    lambda module, args, output, kept=kept: (output.retain_grad(), kept.update(out=output))[1]
                )
                x = X.clone().requires_grad_()
                model(x)
                handle.remove()
                kept["out"][0, 7].mean().backward()
                found.append(x.grad.abs().sum(1))
        assert len(found) == 3
        return found

    agree(program, models)


def test_receptive_field_of_stages(models):
    """The same for stages: hooks that keep `output[0]` of every stage and its gradient."""

    def program(model):
        kept = []
        for name, module in model.named_modules():
            if name.endswith("levels"):
                for level in module:
                    level.register_forward_hook(
                        lambda module, args, output: (output[0].retain_grad(), kept.append(output[0]))[1]
                    )
        x = X.clone().requires_grad_()
        model(x)
        kept[2][0, :, 1, 1].mean().backward()
        return [tuple(y.shape) for y in kept], x.grad, kept[0].grad

    agree(program, models)


def test_attention_weights_from_a_hook(models):
    """Keypoints by attention entropy: a hook on `mixer.qkv`, and the attention recomputed from what it saw."""

    def program(model):
        attention = model.model.levels[2].blocks[2].mixer
        attention.fused_attn = False
        seen = []
        attention.qkv.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        model(X)
        B, L, _ = seen[0].shape
        q, k, v = seen[0].reshape(B, L, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q * attention.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        return -(weights * weights.log()).sum(-1), F.normalize(v, dim=-1)

    agree(program, models)


def test_steps_of_the_scan_recomputed(models):
    """A check of the paper's claims: recomputes the scan's step, B and C from the mixer's own layers."""

    def program(model):
        mixer = model.model.levels[2].blocks[0].mixer
        seen = []
        mixer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        model(X)
        x, _ = mixer.in_proj(seen[0]).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(F.conv1d(x, mixer.conv1d_x.weight, padding="same", groups=mixer.d_inner // 2))
        dt, B, C = mixer.x_proj(x.transpose(1, 2)).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        step = F.softplus(mixer.dt_proj(dt) + mixer.dt_proj.bias)
        return step, B, C, -torch.exp(mixer.A_log.float()), mixer.D.float()

    agree(program, models)


@pytest.mark.parametrize("layer", ["norm", "levels.2.downsample", "levels.3.blocks.1.norm1"])
def test_grad_cam(classifiers, layer):
    """Heat maps: activations and gradients of a layer, by forward and full backward hooks."""

    def program(model):
        target, kept = model.model.get_submodule(layer), {}
        target.register_forward_hook(lambda module, args, output: kept.update(activation=output.detach().clone()))
        target.register_full_backward_hook(lambda module, args, grad: kept.update(gradient=grad[0].detach().clone()))
        model.zero_grad(set_to_none=True)
        model(X.clone().requires_grad_())["logits"][0, 2].backward()
        if layer.endswith("norm1"):  # tokens
            return (kept["gradient"].mean(1, keepdim=True) * kept["activation"]).sum(-1).relu()
        return (kept["gradient"].mean((2, 3), keepdim=True) * kept["activation"]).sum(1).relu()

    agree(program, classifiers)


def test_names_of_layers(models):
    """LoRA targets, freezing lists and hooks by name: every layer with parameters has its published name and kind."""

    def program(model):
        kinds = {}
        for name, module in model.named_modules():
            if list(module.parameters(recurse=False)) and not name.endswith("head"):
                kind = next(base for base in type(module).__mro__ if base.__module__.startswith("torch."))
                kinds[name] = "mixer" if kind is nn.Module else kind.__name__
        return kinds

    ours, theirs = map(program, models)
    blocks = {f"model.levels.{i}.blocks.{j}" for i in (2, 3) for j in range(3)}  # hold the gammas
    assert {k: v for k, v in ours.items() if k not in blocks} == {k: v for k, v in theirs.items() if k not in blocks}
    assert ours["model.levels.2.blocks.0.mixer.in_proj"] == "Linear"


# ---------------------------------------------------------------------------------------------------------------------
# Other heads and other inputs
# ---------------------------------------------------------------------------------------------------------------------


def new_head(inputs, classes=3):
    torch.manual_seed(0)
    return nn.Linear(inputs, classes)


def test_head_replaced(classifiers):
    """Fine-tuning on other classes: a new linear layer as wide as `model.model.head.in_features`, alone trained."""

    def program(model):
        model.model.head = new_head(model.model.head.in_features)
        for parameter in model.parameters():
            parameter.requires_grad = False
        for parameter in model.model.head.parameters():
            parameter.requires_grad = True
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        F.cross_entropy(model(X)["logits"], torch.tensor([0, 2])).backward()
        optimizer.step()
        return model(X)["logits"]

    agree(program, classifiers)


@pytest.mark.parametrize("count", [3, 20])
def test_head_replaced_and_trained_by_the_models_own_loss(classifiers, count):
    def program(model):
        model.model.head = new_head(model.model.head.in_features, count)
        loss = model(X, labels=torch.tensor([0, count - 1]))["loss"]
        loss.backward()
        return loss, model.model.head.weight.grad

    agree(program, classifiers)


def test_head_replaced_by_one_for_regression(classifiers):
    model = copy.deepcopy(classifiers[0])
    model.model.head = new_head(model.model.head.in_features, 1)
    labels = torch.tensor([0.5, -2.0])
    output = model(X, labels=labels)
    torch.testing.assert_close(output.loss, ((output.logits[:, 0] - labels) ** 2).mean())


def test_head_replaced_by_a_deeper_one(classifiers):
    """Plant diseases: a head of several layers, with BatchNorm and dropout, in the place of the linear one."""

    def program(model):
        width = model.model.head.in_features
        hidden = new_head(width, 8)
        model.model.head = nn.Sequential(
            nn.BatchNorm1d(width), hidden, nn.ReLU(inplace=True), nn.Dropout(0.0), new_head(8)
        )
        model.train()
        return model(X)["logits"], model.eval()(X)["logits"]

    agree(program, classifiers)


@pytest.mark.parametrize("nothing", [nn.Identity, nn.Sequential])
def test_head_removed(classifiers, nothing):
    """Feature extraction from the classifier: `model = model.model`, no head, and the call gives pooled features."""

    def program(model):
        bare = model.model
        bare.head = nothing()
        features = bare(X)
        assert features.shape == (2, WIDTHS[-1])
        return features

    agree(program, classifiers)


def test_head_added_to_the_feature_extractor(models):
    """Image-text models: asks `hasattr(model, "head")`, and hangs a projection of its own on the outside."""

    def program(model):
        assert not hasattr(model, "head")
        model.head = new_head(WIDTHS[-1], 7)
        return model.head(model(X)[0])

    agree(program, models)


def test_head_of_the_feature_extractor_replaced(models):
    """Programs that load `AutoModel` and give its backbone a head, to call the backbone itself."""

    def program(model):
        model.model.head = new_head(model.model.head.in_features)
        return model.model(X)

    agree(program, models)


def test_head_of_another_size_while_loading(folder, classifiers):
    """transformers' own way to other classes: `num_labels` with `ignore_mismatched_sizes`."""
    model, info = AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=True, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model(X).logits.shape == (2, 3) and model.model.head.weight.isfinite().all()
    assert sorted(key for key, *_ in info["mismatched_keys"]) == ["model.head.bias", "model.head.weight"]
    torch.testing.assert_close(
        model.model.forward_features(X), classifiers[1].model.forward_features(X), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("channels", [1, 4, 150])
def test_first_convolution_swapped(models, channels):
    """Multispectral, EEG and radar input: another first convolution, the RGB filters kept, the rest their mean."""

    def program(model):
        old = model.model.patch_embed.conv_down[0]
        new = nn.Conv2d(
            channels,
            old.out_channels,
            kernel_size=old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            bias=old.bias is not None,
        )
        with torch.no_grad():
            new.weight.copy_(old.weight.mean(1, keepdim=True).expand_as(new.weight))
            new.weight[:, :3] = old.weight[:, :channels]
        model.model.patch_embed.conv_down[0] = new
        return list(model(image((2, channels, 64, 64))))

    agree(program, models)


def test_stem_replaced(models):
    """Programs with inputs of their own: another module in the place of the whole stem."""

    def program(model):
        torch.manual_seed(0)
        model.model.patch_embed = nn.Sequential(nn.Unflatten(1, (6, 1)), nn.Flatten(1, 2), nn.Conv2d(6, 16, 4, 4))
        return list(model(image((2, 6, 64, 64))))

    agree(program, models)


def test_stem_replaced_for_flat_inputs(models):
    """Certified robustness: a stem that takes vectors and gives the map, so that the model's input is (B, N)."""

    def program(model):
        torch.manual_seed(0)
        model.model.patch_embed = nn.Sequential(nn.Linear(10, 16 * 8 * 8), nn.Unflatten(1, (16, 8, 8)))
        return list(model(image((2, 10))))

    agree(program, models)


# ---------------------------------------------------------------------------------------------------------------------
# Loading, saving, copying
# ---------------------------------------------------------------------------------------------------------------------


def test_loading_arguments(folder, models, tmp_path):
    """Arguments that programs give to `from_pretrained`, among them those that other versions of the code needed."""
    expected = models[1](X)
    for arguments in (
        {"low_cpu_mem_usage": False},
        {"low_cpu_mem_usage": True},
        {"local_files_only": True, "cache_dir": tmp_path},
        {"torch_dtype": "auto"},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"revision": "main", "force_download": False},
    ):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, **arguments)
        assert not model.training
        torch.testing.assert_close(list(model(X)), list(expected), rtol=1e-4, atol=1e-4)


def test_configuration_changed_before_loading(folder, models):
    """mmdetection: takes the configuration, sets the drop-path rate, and loads, or builds without weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.drop_path_rate = 0.3
    model = AutoModel.from_pretrained(folder, config=config, trust_remote_code=True)
    assert model.model.levels[3].blocks[1].drop_path.rate == pytest.approx(0.3)
    torch.testing.assert_close(list(model(X)), list(models[1](X)), rtol=1e-4, atol=1e-4)
    fresh = AutoModel.from_config(config, trust_remote_code=True).train()
    assert [x.shape[1] for x in fresh(X)[1]] == WIDTHS


def test_configuration_read(models):
    """Wrappers that size their layers and their preprocessing by the configuration."""
    config = models[0].config
    assert (config.dim, config.depths, config.num_labels) == (16, [1, 1, 3, 2], CLASSES)
    assert (config.mean, config.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (config.crop_mode, config.crop_pct) == ("center", 1.0)
    assert getattr(config, "hidden_size", None) == config.hidden_sizes[-1] == WIDTHS[-1]


def test_patches_for_the_published_code(folder, models, monkeypatch):
    """Loaders that patch around the published code: `torch.linspace`, classes' `__init__`, a mamba_ssm that fails."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    def fail(*args, **kwargs):
        raise RuntimeError("no CUDA")

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_fn = fail
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for entry in config.auto_map.values():
        cls = get_class_from_dynamic_module(entry, folder)
        if issubclass(cls, PreTrainedModel):
            init = cls.__init__

            def patched(self, *args, init=init, **kwargs):
                init(self, *args, **kwargs)
                if not hasattr(self, "all_tied_weights_keys"):
                    self.post_init()

            monkeypatch.setattr(cls, "__init__", patched)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(list(model(X)), list(models[1](X)), rtol=1e-4, atol=1e-4)


def test_shim_of_tied_weights(folder, models, monkeypatch):
    """For remote code without `post_init`: a property on the base class, which cannot be assigned to."""
    monkeypatch.setattr(PreTrainedModel, "all_tied_weights_keys", property(lambda self: {}), raising=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    torch.testing.assert_close(list(model(X)), list(models[1](X)), rtol=1e-4, atol=1e-4)


def test_maps_of_the_attention(models):
    """By hand, from a hook that keeps the input of the last attention."""

    def program(model):
        kept = {}
        module = model.model.levels[3].blocks[-1].mixer
        module.register_forward_hook(lambda module, inputs, output: kept.update(x=inputs[0]))
        with torch.no_grad():
            model(X)
            x = kept["x"]
            B, N, C = x.shape
            qkv = module.qkv(x).reshape(B, N, 3, module.num_heads, C // module.num_heads).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            q, k = module.q_norm(q), module.k_norm(k)
            attention = ((q * module.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
            return attention, module.proj_drop(module.proj((attention @ v).transpose(1, 2).reshape(B, N, C)))

    agree(program, models)


def test_state_dict_saved_and_loaded(folder, classifiers, tmp_path):
    """Training scripts: `torch.save` of `state_dict()` and the optimizer's, and a strict load into a fresh model."""
    model = copy.deepcopy(classifiers[0]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    F.cross_entropy(model(X)["logits"], LABELS).backward()
    optimizer.step()
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 1}
    torch.save(saved, tmp_path / "best.pth")
    loaded = torch.load(tmp_path / "best.pth", map_location="cpu", weights_only=True)
    fresh = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    fresh.load_state_dict(loaded["model_state_dict"])
    torch.optim.Adam(fresh.parameters(), lr=1e-3).load_state_dict(loaded["optimizer_state_dict"])
    assert torch.equal(fresh(X)["logits"], model.eval()(X)["logits"])


def test_checkpoint_of_a_program_with_the_published_classifier(classifiers):
    """Checkpoints that programs saved of the published classifier load strictly, with or without its wrapper's name."""
    ours, theirs = copy.deepcopy(classifiers)
    theirs.model.head = new_head(theirs.model.head.in_features)
    ours.model.head = new_head(ours.model.head.in_features, 3)
    ours.load_state_dict(theirs.state_dict())
    ours.model.load_state_dict(theirs.model.state_dict())
    torch.testing.assert_close(ours(X)["logits"], theirs(X)["logits"], rtol=1e-4, atol=1e-4)


def test_checkpoint_of_a_program_with_the_published_feature_extractor(models):
    """The same of `AutoModel`: the published one has the classifier's weights in its state dict all the same."""

    class Program(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone
            self.classifier = new_head(WIDTHS[-1])

        def forward(self, x):
            return self.classifier(self.backbone(x)[0])

    ours, theirs = map(Program, copy.deepcopy(models))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)


def test_whole_model_pickled(classifiers, tmp_path):
    """Scripts that `torch.save` the model itself."""
    torch.save(classifiers[0], tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(model(X)["logits"], classifiers[0](X)["logits"])


def test_moving_average_by_copy(classifiers):
    """Exponential moving averages: timm's copy the model once and then walk both state dicts."""
    from timm.utils import ModelEmaV3

    def program(model):
        ema = ModelEmaV3(model, decay=0.5)
        with torch.no_grad():
            model.model.head.weight.add_(1.0)
        ema.update(model)
        assert next(model.parameters()).data_ptr() != next(ema.module.parameters()).data_ptr()
        return ema.module(X)["logits"]

    agree(program, classifiers)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_stem_and_first_stages_frozen(models):
    """Detectors: the stem and the first stages without gradients and in eval mode, the rest trained."""

    def program(model):
        model.train()
        for part in (model.model.patch_embed, *model.model.levels[:2]):
            part.eval().requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        _, maps = model(X)
        sum(m.square().mean() for m in maps).backward()
        optimizer.step()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and all(name.startswith(("model.levels.2", "model.levels.3", "model.norm")) for name in changed)
        return model.model.levels[3].blocks[0].mixer.A_log.detach()

    agree(program, models)


def test_last_children_unfrozen(classifiers):
    """Two-phase fine-tuning: all frozen, then the last of `model.model`'s children, lists opened, thawed again."""

    def program(model):
        model.requires_grad_(False)
        flat = []
        for name, child in model.model.named_children():
            if name != "head":
                flat.extend(list(child.children()) or [child])
        parts = [part for part in flat if list(part.parameters())]
        for part in parts[-2:]:
            part.requires_grad_(True)
        return len(parts), sum(p.numel() for p in model.parameters() if p.requires_grad)

    agree(program, classifiers)


def test_frozen_by_names(classifiers):
    """Freezing by the beginning of a name ("model.head.") or by a part of it ("norm", "levels.3")."""

    def program(model):
        kept = {
            name
            for name, _ in model.named_parameters()
            if name.startswith("model.head.") or "levels.3" in name or "norm" in name
        }
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in kept
        return {name: p.numel() * torch.ones(1) for name, p in model.named_parameters() if p.requires_grad}

    agree(program, classifiers)


def test_groups_of_the_optimizer(classifiers):
    """Weight decay by name and rank, timm's own groups, and a learning rate for head and backbone each."""
    from timm.optim import create_optimizer_v2

    def program(model):
        skip = ("bias", "norm", "A_log", ".D", "gamma")
        plain = [p for name, p in model.named_parameters() if any(part in name for part in skip)]
        decay = [p for name, p in model.named_parameters() if not any(part in name for part in skip)]
        head = {id(p) for p in model.model.head.parameters()}
        optimizers = [
            torch.optim.AdamW(
                [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.05}], lr=1e-3
            ),
            create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05),
            torch.optim.AdamW(
                [
                    {"params": model.model.head.parameters(), "lr": 1e-2},
                    {"params": [p for p in model.parameters() if id(p) not in head], "lr": 1e-4},
                ]
            ),
        ]
        counts = [[sum(p.numel() for p in group["params"]) for group in o.param_groups] for o in optimizers]
        F.cross_entropy(model(X)["logits"], LABELS).backward()
        optimizers[0].step()
        return torch.tensor(counts), model(X)["logits"]

    agree(program, classifiers)


def test_distributed_data_parallel(classifiers, tmp_path):
    """Contrastive training over several machines: the model inside DistributedDataParallel (here a world of one)."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        def program(model):
            model = nn.parallel.DistributedDataParallel(model.train())
            embeddings = torch.cat([model(part)["logits"] for part in (X, X.flip(0))])
            F.normalize(embeddings).square().sum().sub(embeddings.sum()).backward()
            assert all(name.startswith("module.model.") for name in model.state_dict())
            return model.module.model.patch_embed.conv_down[0].weight.grad

        agree(program, classifiers)
    finally:
        torch.distributed.destroy_process_group()


def test_batch_norms_converted(classifiers):
    """Training on several GPUs: BatchNorm layers found by class and converted."""

    def program(model):
        count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return count, model.eval()(X)["logits"]

    agree(program, classifiers)


def test_lora(classifiers, tmp_path):
    """Adapters on the layers that people name as targets: train, merge, save, load."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = copy.deepcopy(classifiers[0])
    before = model(X).logits
    targets = ["qkv", "proj", "in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["head"])).train()
    for module in tuned.modules():  # as README has it: no adapter's file has the running statistics
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        tuned(pixel_values=X, labels=LABELS).loss.backward()
        optimizer.step()
    frozen = [
        name for name, p in tuned.named_parameters() if p.requires_grad and "lora_" not in name and "head" not in name
    ]
    assert not frozen
    after = tuned.eval()(pixel_values=X).logits
    assert not torch.allclose(before, after, atol=1e-3)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(classifiers[0]), tmp_path).eval()
    assert torch.allclose(again(pixel_values=X).logits, after, atol=1e-5)
    assert torch.allclose(tuned.merge_and_unload()(X).logits, after, atol=1e-4)


def test_lora_on_the_features(models):
    """peft's wrapper of feature extractors gives arguments for text, without values."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(models[0])
    expected = model(X).pooler_output
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="FEATURE_EXTRACTION")).eval()
    assert torch.allclose(tuned(pixel_values=X).pooler_output, expected, atol=1e-5)
    for name in ("input_ids", "interpolate_pos_encoding"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(X, **{name: torch.ones(1)})


def test_trainer_with_four_channels(classifiers, tmp_path):
    """EEG spectrograms: the first convolution swapped, transformers' Trainer, and accuracy from its predictions."""
    from transformers import Trainer, TrainingArguments

    model = copy.deepcopy(classifiers[0])
    model.model.patch_embed.conv_down[0] = nn.Conv2d(4, SETTINGS["in_dim"], 3, 2, 1, bias=False)
    data = [{"pixel_values": x, "labels": i % CLASSES} for i, x in enumerate(image((6, 4, 32, 32)))]
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=3, report_to="none", use_cpu=True, save_strategy="no"
    )
    before = model.model.head.weight.detach().clone()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics)
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs  # or losses would be scaled otherwise in gradient accumulation
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1 and seen == [(6, CLASSES)]
    assert not torch.equal(before, model.model.head.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Other runtimes
# ---------------------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """The wrapper that programs put around the classifier, to have a tensor in the place of a dictionary."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)["logits"]


def test_traced(classifiers):
    """Deployment by `torch.jit.trace`, on another batch than the traced one."""
    traced = torch.jit.trace(Logits(classifiers[0]).eval(), X)
    torch.testing.assert_close(traced(X.flip(3)), classifiers[1](X.flip(3))["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Output nr 1")  # another rounding
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_traced_in_half_precision(classifiers, dtype):
    """Torch traces twice, once without gradients, and compares the two graphs."""
    model = Logits(copy.deepcopy(classifiers[0]).eval()).to(dtype)
    traced, x = torch.jit.trace(model, X.to(dtype)), X.flip(3).to(dtype)
    with torch.no_grad():
        expected = model(x)
        assert (traced(x) - expected).abs().max() < 0.1 * expected.std()


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(classifiers, tmp_path, dynamo):
    """ONNX by `torch.onnx.export`, with named axes, by its older and its newer way, compared in ONNX Runtime."""
    import onnxruntime

    path = tmp_path / "model.onnx"
    axes = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"input": [0]}, "opset_version": 17}
    torch.onnx.export(
        classifiers[0] if dynamo else Logits(classifiers[0]).eval(),
        (X,),
        path,
        input_names=["input"],
        output_names=["logits"],
        dynamo=dynamo,
        verbose=False,
        **axes,
    )
    x = image((3, 3, 64, 96), seed=1)
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), classifiers[1](x)["logits"], rtol=1e-3, atol=1e-3)


def test_cost_counted(models):
    """Tables of cost: parameters, and multiplications as torch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models[0](X)
    assert counter.get_total_flops() > 1e6
    without_head = sum(p.numel() for name, p in models[1].named_parameters() if "head" not in name)
    assert sum(p.numel() for p in models[0].parameters()) == without_head
