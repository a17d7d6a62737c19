#!/usr/bin/env python
"""Build mamba_ssm's CUDA scan alone, for the GPU that is here, from the sources of mamba_ssm.

The package's own installation compiles for ten architectures, and complex gradients, which take half of the time. Put
OUTPUT on PYTHONPATH then: it holds the extension `selective_scan_cuda` and a `mamba_ssm` with nothing in it but
`selective_scan_fn`. The sources come with `pip download --no-deps --no-binary :all: mamba-ssm`.
"""

import os
from pathlib import Path

import common  # before torch
import torch


# In the place of mamba_ssm's module of the same name, which imports all else that the package has.
INTERFACE = '''"""mamba_ssm's selective scan: its CUDA kernels, without the rest of the package."""

import torch  # noqa: F401  (the extension needs its libraries)
import selective_scan_cuda


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus):
        u, delta, B, C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, delta, B, C))
        B, C, D = B.unsqueeze(1), C.unsqueeze(1), D.contiguous()
        y, states = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, states)
        ctx.delta_softplus = delta_softplus
        return y

    @staticmethod
    def backward(ctx, grad):
        u, delta, A, B, C, D, delta_bias, states = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        du, ddelta, dA, dB, dC, dD, dbias = selective_scan_cuda.bwd(
            u, delta, A, B, C, D, None, delta_bias, grad, states, None, None, ctx.delta_softplus, False
        )
        return du, ddelta, dA, dB.squeeze(1), dC.squeeze(1), dD, dbias, None


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    """u, delta (batch, channels, length); A (channels, states); B, C (batch, states, length); D, delta_bias float32."""
    if D is None or delta_bias is None or z is not None or return_last_state:
        raise NotImplementedError("this scan takes D and delta_bias, no z, and gives no state")
    return _Scan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)
'''

# In the place of the kernels for gradients of complex weights, which the extension refers to.
NO_COMPLEX = """
#include <c10/cuda/CUDAStream.h>
#include <torch/python.h>
#include "selective_scan.h"

template <typename input_t, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &, cudaStream_t) {
    TORCH_CHECK(false, "built without complex weights");
}
template void selective_scan_bwd_cuda<float, c10::complex<float>>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, c10::complex<float>>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::BFloat16, c10::complex<float>>(SSMParamsBwd &, cudaStream_t);
"""


def main(arguments=None):
    parser = common.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", type=Path, help="unpacked source distribution of mamba_ssm")
    parser.add_argument("output", type=Path, nargs="?", default=common.ROOT / ".cache" / "mamba_ssm",
                        help="folder to build in (default: .cache/mamba_ssm)")  # fmt: skip
    parser.add_argument("--arch", help="architecture, such as 9.0 (default: that of the GPU)")
    args = parser.parse_args(arguments)

    folder = args.sources / "csrc" / "selective_scan"
    sources = [path.resolve() for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.cu")])]
    if not sources:
        raise ValueError(f"{folder} holds no sources; give the unpacked source distribution of mamba_ssm")
    if args.arch is None:
        if not torch.cuda.is_available():
            raise ValueError("torch finds no GPU here; name its architecture, such as --arch 9.0")
        args.arch = "{}.{}".format(*torch.cuda.get_device_capability())
    build(sources, args.output.resolve(), args.arch)
    for path in args.sources.glob("PKG-INFO"):  # so that the version can be read off
        common.write_whole(args.output / "mamba_ssm.egg-info" / "PKG-INFO", path.read_text())
    print(args.output)


def build(sources: list[Path], output: Path, arch: str) -> None:
    """Compiles the files in parallel ($MAX_JOBS at a time) into `output`/selective_scan_cuda.so."""
    from torch.utils import cpp_extension

    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    common.write_whole(output / "no_complex.cpp", NO_COMPLEX)
    (output / "lock").unlink(missing_ok=True)  # of a build that was killed: this one would wait for its end
    undefine = [f"-U__CUDA_NO_{kind}__" for kind in (
        "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS", "BFLOAT162_OPERATORS",
        "BFLOAT162_CONVERSIONS")]  # fmt: skip
    cpp_extension.load(
        "selective_scan_cuda",
        [str(path) for path in [*sources, output / "no_complex.cpp"] if not path.match("*_bwd_*_complex.cu")],
        extra_include_paths=[str(sources[0].parent)],
        build_directory=str(output),
        extra_cflags=["-O3"],
        extra_cuda_cflags=["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda", *undefine],
        is_python_module=False,
        verbose=True,
    )
    for name in ("__init__.py", "ops/__init__.py"):
        common.write_whole(output / "mamba_ssm" / name, "")
    common.write_whole(output / "mamba_ssm" / "ops" / "selective_scan_interface.py", INTERFACE)


if __name__ == "__main__":
    common.run(main)
