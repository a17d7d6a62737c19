"""Deterministic, well-conditioned weights and images for any MambaVision state dict.

Each tensor is drawn from its own generator, seeded by (seed, name), so that a value depends on nothing but its tensor's
name and shape. `fixtures/official_outputs.safetensors` holds what the published package computes on these.
"""

import zlib

import numpy as np
import torch


def fill(name: str, shape, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    leaf = name.rsplit(".", 1)[-1]
    shape = tuple(shape)
    if leaf == "num_batches_tracked":
        return torch.zeros((), dtype=torch.long)
    if leaf == "running_var":
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("dt_proj.bias"):
        step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape)).astype(np.float32)
        value = step + np.log(-np.expm1(-step))  # the inverse of softplus
    else:
        noise = rng.standard_normal(shape).astype(np.float32)
        if leaf == "A_log":
            value = np.log(np.arange(1, shape[1] + 1, dtype=np.float32)) + 0.1 * noise
        elif leaf in ("gamma", "gamma_1", "gamma_2"):
            value = 0.5 + 0.1 * noise
        elif leaf in ("bias", "running_mean"):
            value = 0.1 * noise
        elif len(shape) == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32))


def filled(shapes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: fill(name, shape, seed) for name, shape in shapes.items()}


def image(shape, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng([seed, *shape])
    return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))
