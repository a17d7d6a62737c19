"""The two snippets of the published model card, word for word, on a folder with published-style files.

What a test lacks is stood in for, without touching the snippets: the repository is a folder of the same name below the
working directory, the photograph is drawn here in the place of the download, and `.cuda()` stays where it is.
"""

import json

import numpy as np
import pytest
import torch
from conftest import copy_code, published_style_folder, run_python
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from timm.data.transforms_factory import create_transform
from transformers import AutoConfig, AutoModel


PREPARE = """
from PIL import Image
from timm.data.transforms_factory import create_transform
import requests

model = MODEL.from_pretrained("nvidia/MambaVision-T-1K", trust_remote_code=True)

# eval mode for inference
model.cuda().eval()

# prepare image for the model
url = 'http://images.cocodataset.org/val2017/000000020247.jpg'
image = Image.open(requests.get(url, stream=True).raw)
input_resolution = (3, 224, 224)  # MambaVision supports any input resolutions

transform = create_transform(input_size=input_resolution,
                             is_training=False,
                             mean=model.config.mean,
                             std=model.config.std,
                             crop_mode=model.config.crop_mode,
                             crop_pct=model.config.crop_pct)

inputs = transform(image).unsqueeze(0).cuda()
"""

CLASSIFICATION = f"""
from transformers import AutoModelForImageClassification
{PREPARE.replace("MODEL", "AutoModelForImageClassification")}
# model inference
outputs = model(inputs)
logits = outputs['logits']
predicted_class_idx = logits.argmax(-1).item()
print("Predicted class:", model.config.id2label[predicted_class_idx])
"""

FEATURES = f"""
from transformers import AutoModel
{PREPARE.replace("MODEL", "AutoModel")}
# model inference
out_avg_pool, features = model(inputs)
print("Size of the averaged pool features:", out_avg_pool.size())  # torch.Size([1, 640])
print("Number of stages in extracted features:", len(features)) # 4 stages
print("Size of extracted features in stage 1:", features[0].size()) # torch.Size([1, 80, 56, 56])
print("Size of extracted features in stage 4:", features[3].size()) # torch.Size([1, 640, 7, 7])
"""

PRINTED_SIZES = """\
Size of the averaged pool features: torch.Size([1, 640])
Number of stages in extracted features: 4
Size of extracted features in stage 1: torch.Size([1, 80, 56, 56])
Size of extracted features in stage 4: torch.Size([1, 640, 7, 7])
"""


def published_T_folder(parent):
    """`nvidia/MambaVision-T-1K` below `parent`, with the labels that the published config.json has too."""
    folder = published_style_folder(parent / "nvidia/MambaVision-T-1K", "MambaVision-T-1K")
    config = json.loads((folder / "config.json").read_text())
    info = ImageNetInfo()
    config["id2label"] = {str(i): info.index_to_description(i) for i in range(info.num_classes())}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_photograph(path):
    """A colour image larger than the model's, and not square: smooth, with an edge."""
    y, x = np.mgrid[0:427, 0:640] / 427
    pixels = np.stack([x / 1.5, y, 0.5 + 0.5 * np.sin(9 * x * y)], -1)
    pixels[120:300, 200:420] = 1 - pixels[120:300, 200:420]
    Image.fromarray((255 * pixels).astype(np.uint8)).save(path, quality=95)


# What the snippets expect around them, where the working directory has the photograph.
STAND_INS = """
import sys, types
import torch

try:
    import requests
except ImportError:
    requests = sys.modules["requests"] = types.ModuleType("requests")
requests.get = lambda url, stream: types.SimpleNamespace(raw=open("photograph.jpg", "rb"))
torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
torch.set_grad_enabled(False)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A working directory with the photograph, in which `nvidia/MambaVision-T-1K` is a repository."""
    parent = tmp_path_factory.mktemp("hub")
    published_T_folder(parent)
    save_photograph(parent / "photograph.jpg")
    return parent


@pytest.fixture(scope="module")
def expected(hub, published):
    """Logits, pooled features and maps of the published package for the photograph, cut by timm as the card does."""
    model = published.MambaVision(
        dim=80,
        in_dim=32,
        depths=[1, 3, 8, 4],
        num_heads=[2, 4, 8, 16],
        window_size=[8, 8, 14, 7],
        mlp_ratio=4,
    )
    tensors = load_file(hub / "nvidia/MambaVision-T-1K/model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    maps = []  # of the package's stages: what enters their downsampling, and what leaves the last
    for level in model.levels[:3]:
        level.downsample.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    model.levels[3].register_forward_hook(lambda module, args, output: maps.append(output))
    transform = create_transform((3, 224, 224), crop_mode="center", crop_pct=1.0)
    inputs = transform(Image.open(hub / "photograph.jpg")).unsqueeze(0)
    with torch.inference_mode():
        pooled = model.eval().forward_features(inputs)
        return model.head(pooled), pooled, *maps


def run_snippets(hub, overlay=None):
    """Run both in a new process; what they printed, and their results in the order of `expected`."""
    keep = 'torch.save((logits, out_avg_pool, *features), "results.pt")'
    code = "import os, sys; os.chdir(sys.argv[1])" + STAND_INS + CLASSIFICATION + FEATURES + keep
    printed = run_python(code, hub, overlay=overlay).stdout
    return printed, torch.load(hub / "results.pt")


def assert_snippets_right(printed, results, expected):
    label = ImageNetInfo().index_to_description(expected[0].argmax().item())
    assert printed == f"Predicted class: {label}\n{PRINTED_SIZES}"
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()


def test_snippets(hub, expected):
    assert_snippets_right(*run_snippets(hub), expected)


def test_snippets_with_older_transformers(hub, expected, older_transformers):
    assert_snippets_right(*run_snippets(hub, older_transformers), expected)


def test_the_label_that_the_card_shows(hub):
    config = AutoConfig.from_pretrained(hub / "nvidia/MambaVision-T-1K", trust_remote_code=True)
    assert config.id2label[294] == "brown bear, bruin, Ursus arctos" and config.num_labels == 1000


def test_feature_sizes_of_B(hub, tmp_path):
    """The published card of MambaVision-B-1K shows T's sizes; B's are these. Shapes need no weights."""
    config = json.loads((hub / "nvidia/MambaVision-T-1K/config.json").read_text())
    config |= {"dim": 128, "in_dim": 64, "depths": [3, 3, 10, 5], "layer_scale": 1e-5, "drop_path_rate": 0.3}
    folder = copy_code(tmp_path / "MambaVision-B-1K")
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        out_avg_pool, features = AutoModel.from_config(config, trust_remote_code=True)(torch.empty(1, 3, 224, 224))
    assert out_avg_pool.size() == (1, 1024)
    sizes = [tuple(x.size()) for x in features]
    assert sizes == [(1, 128, 56, 56), (1, 256, 28, 28), (1, 512, 14, 14), (1, 1024, 7, 7)]
