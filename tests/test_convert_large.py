"""The largest published model, of 740 M parameters: converted in bounded memory, to the published numbers."""

from pathlib import Path

import pytest
import torch
from checkpoints import RELOAD, published_model, published_weights, save
from conftest import ROOT, run_python
from safetensors.torch import load_file
from weights import image


VARIANT = "MambaVision-L3-256-21K"

CONVERT = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import convert_checkpoint

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

first, second, work = sys.argv[1:]
assert not convert_checkpoint.main([first, work + "/first"])  # brings in what libraries load late
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
before, start = peak(), time.monotonic()
assert not convert_checkpoint.main([second, work + "/second"])
print(time.monotonic() - start, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_largest_model(published, tmp_path, capsys):
    small = save(tmp_path / "mambavision_tiny_1k.pth.tar", {"state_dict": published_weights("MambaVision-T-1K")})
    file = tmp_path / "mambavision_L3_21k_740m_256.pth.tar"
    save(file, {"state_dict": published_weights(VARIANT), "arch": "mamba_vision_L3", "epoch": 300})
    *_, figures = run_python(CONVERT, small, file, tmp_path).stdout.splitlines()
    seconds, peak = map(float, figures.split())
    size = file.stat().st_size
    with capsys.disabled():
        print(f"\n{VARIANT}: {size / 1e9:.2f} GB converted in {seconds:.0f} s, peak {peak / size:.2f} times the file")
    assert 0.5 < peak / size < 1.3

    pixels = image((1, 3, 64, 96))
    torch.save(pixels, tmp_path / "pixels.pt")
    weights = torch.load(file, mmap=True)["state_dict"]
    expected = published_model(published, VARIANT, weights)(pixels)
    run_python(RELOAD, tmp_path / "pixels.pt", tmp_path / "second")
    actual = load_file(tmp_path / "second" / "outputs.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4 * value.std().item(), msg=name)
