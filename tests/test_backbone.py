"""`MambaVisionBackbone` under transformers' segmenters, and its own contract."""

import pytest
import torch
from conftest import SMALL
from repository.configuration_mambavision import MambaVisionConfig
from repository.modeling_mambavision import MambaVisionBackbone
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from weights import image


ALL = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(autouse=True, scope="module")
def registered():
    AutoConfig.register("mambavision", MambaVisionConfig, exist_ok=True)
    AutoBackbone.register(MambaVisionConfig, MambaVisionBackbone, exist_ok=True)
    yield
    CONFIG_MAPPING._extra_content.pop("mambavision")  # or later tests would not load their folders' own code
    AutoBackbone._model_mapping._extra_content.pop(MambaVisionConfig)


def config(**settings):
    return MambaVisionConfig(**{**SMALL, **settings})


@pytest.mark.parametrize(
    "chosen, names",
    [
        ({}, ["stage4"]),
        ({"out_features": ["stage2", "stage4"]}, ["stage2", "stage4"]),
        ({"out_indices": (0, 1, 2, 3)}, ALL),
        ({"out_indices": [0, -1]}, ["stage1", "stage4"]),
    ],
)
@torch.inference_mode()
def test_maps_of_the_chosen_stages(chosen, names):
    backbone = AutoBackbone.from_config(config(**chosen)).eval()
    output = backbone(image((2, 3, 50, 64)), output_hidden_states=True)
    indices = [ALL.index(name) for name in names]
    assert list(backbone.out_features) == names and backbone.channels == [16 * 2**i for i in indices]
    assert len(output.hidden_states) == 4 and len(output.feature_maps) == len(names)
    for i, stage_map in zip(indices, output.feature_maps, strict=True):
        assert torch.equal(stage_map, output.hidden_states[i])
    plain = backbone(image((2, 3, 50, 64)), return_dict=False)
    assert len(plain) == 1 and torch.equal(plain[0][0], output.feature_maps[0])
    assert all(stage_map.is_contiguous() for stage_map in (*output.hidden_states, *output.feature_maps))
    backbone.config.output_hidden_states = True
    assert len(backbone(image((2, 3, 50, 64))).hidden_states) == 4
    backbone.config.return_dict = False
    assert len(backbone(image((2, 3, 50, 64)))) == 2


@torch.inference_mode()
def test_out_norm_normalises_over_channels():
    torch.manual_seed(0)
    backbone = MambaVisionBackbone(config(out_norm=True, out_indices=[1, 3])).eval()
    assert {n.split(".")[0] for n, _ in backbone.named_parameters()} == {"model", "outnorm1", "outnorm3"}
    torch.nn.init.normal_(backbone.outnorm1.weight)
    torch.nn.init.normal_(backbone.outnorm1.bias)
    output = backbone(image((2, 3, 64, 64)), output_hidden_states=True)
    x = output.hidden_states[1]
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-5).sqrt()
    expected = expected * backbone.outnorm1.weight[:, None, None] + backbone.outnorm1.bias[:, None, None]
    torch.testing.assert_close(output.feature_maps[0], expected, rtol=1e-4, atol=1e-5)
    backbone.out_features = ["stage3"]
    with pytest.raises(ValueError, match="stage3 has no norm"):
        backbone(image((2, 3, 64, 64)))
    counted_back = MambaVisionBackbone(config(out_norm=True, out_indices=[0, -1])).eval()
    assert {n.split(".")[0] for n, _ in counted_back.named_parameters()} == {"model", "outnorm0", "outnorm3"}
    for stage_map in counted_back(image((2, 3, 64, 64))).feature_maps:
        assert stage_map.is_contiguous() and stage_map.mean(1).abs().max() < 1e-5


def test_every_parameter_of_the_backbone_gets_a_gradient():
    backbone = MambaVisionBackbone(config(out_norm=True, out_features=ALL))
    sum(x.square().mean() + x.sum() for x in backbone(image((2, 3, 64, 64))).feature_maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_upernet_segments_and_trains_on_the_backbone():
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config(out_features=ALL), hidden_size=32, auxiliary_in_channels=64, num_labels=6)
    )
    assert isinstance(model.backbone, MambaVisionBackbone)
    labels = torch.randint(0, 6, (2, 64, 96), generator=torch.Generator().manual_seed(0))
    output = model(image((2, 3, 64, 96)), labels=labels)
    assert output.logits.shape == (2, 6, 64, 96)
    output.loss.backward()
    # all stages of the backbone learn; its final norm belongs to pooled features and is not there
    assert all(p.grad is not None for p in model.backbone.parameters())


@torch.inference_mode()
def test_mask2former_runs_on_the_backbone():
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=config(out_features=ALL),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            dim_feedforward=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=5,
            num_labels=4,
        )
    ).eval()
    output = model(image((1, 3, 64, 96)))
    assert output.masks_queries_logits.shape == (1, 5, 16, 24) and output.class_queries_logits.shape == (1, 5, 5)
    assert output.masks_queries_logits.isfinite().all()


def test_its_tensors_are_saved_under_their_names(tmp_path):
    backbone = MambaVisionBackbone(config())
    backbone.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == backbone.state_dict().keys()
