"""Mixed precision: which type a device computes in, and loss scaling where that type needs it."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def autocast_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that products are computed in.

    Args:
        name: of a type; "auto" = bfloat16 where the device has units for it (GPUs since Ampere, CPUs with AMX),
            float16 on other GPUs, float32 elsewhere.
        device: that computes.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return (
        torch.bfloat16
        if device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        else torch.float32
    )


def make_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses so that float16 gradients do not vanish; does nothing for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
