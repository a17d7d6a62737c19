"""The published package as an oracle: `mambavision` 1.2.0, with a plain loop in the place of its compiled scan."""

import sys
import types

import torch
import torch.nn.functional as F


def sequential_scan(u, delta, A, B, C, D, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What mamba_ssm's `selective_scan_fn` computes for MambaVision: u, delta (b, d, l); A (d, n); B, C (b, n, l)."""
    assert z is None and not return_last_state
    delta = delta.float() + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = torch.zeros(u.shape[0], *A.shape, device=u.device)
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[:, None, :, t].float() * u[:, :, t, None].float()
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t].float()))
    return (torch.stack(outputs, 2) + D[:, None] * u.float()).to(u.dtype)


def import_published(folder):
    """The module `mambavision.models.mamba_vision` of the package installed in `folder`."""
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = sequential_scan
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["mamba_ssm.ops.selective_scan_interface"] = interface
    sys.path.append(str(folder))
    try:
        import mambavision.models.mamba_vision as module
    finally:
        sys.path.remove(str(folder))
    return module
