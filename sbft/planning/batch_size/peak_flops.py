"""Peak operations per second of GPUs, by their datasheets: what model FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class _Peak:
    names: str
    """Pattern of the device's whole name in torch, without the maker."""
    bfloat16: float | None
    """TFLOP/s of dense matrix products in bfloat16, summed in float32; None where the device has no bfloat16."""
    float32: float
    """TFLOP/s of float32 without tensor cores."""


# Figures are for dense matrices; datasheets also give those for sparse ones, which are twice as high. Whole names are
# matched, because a laptop's GPU, a slice of a GPU (MIG) and variants such as Ti or D begin with the name of a faster device.
_PEAKS = (
    # NVIDIA A100 datasheet, SXM and PCIe alike.
    _Peak(r"A100-(SXM|PCI[Ee])\w*-\d+GB|A100 \d+GB PCIe", 312, 19.5),
    # NVIDIA A30 and A10 datasheets.
    _Peak(r"A30", 165, 10.3),
    _Peak(r"A10", 125, 31.2),
    # NVIDIA A40 and RTX A6000 datasheets.
    _Peak(r"A40", 149.7, 37.4),
    _Peak(r"RTX A6000", 154.8, 38.7),
    # NVIDIA H100 datasheet: SXM, PCIe (its first edition), NVL.
    _Peak(r"H100 80GB HBM3", 989.5, 67),
    _Peak(r"H100 PCIe", 756.5, 51),
    _Peak(r"H100 NVL", 835.5, 60),
    # NVIDIA H200 and GH200 datasheets.
    _Peak(r"H200", 989.5, 67),
    _Peak(r"H200 NVL", 835.5, 60),
    _Peak(r"GH200 \d+GB", 989.5, 67),
    # NVIDIA HGX B200, an eighth of it.
    _Peak(r"B200", 2250, 75),
    # NVIDIA L4, L40 and L40S datasheets.
    _Peak(r"L4", 121, 30.3),
    _Peak(r"L40", 181, 90.5),
    _Peak(r"L40S", 362, 91.6),
    # NVIDIA architecture papers GA102, Ada and RTX Blackwell.
    _Peak(r"GeForce RTX 3090", 71.2, 35.6),
    _Peak(r"GeForce RTX 4090", 165.2, 82.6),
    _Peak(r"GeForce RTX 5090", 209.5, 104.8),
    # NVIDIA T4 and V100 datasheets: Turing and Volta have no bfloat16.
    _Peak(r"T4", None, 8.1),
    _Peak(r"V100-SXM2-\d+GB", None, 15.7),
    _Peak(r"V100-PCIE-\d+GB", None, 14),
)
_MAKER = re.compile(r"^(NVIDIA|Tesla) ")


def peak_flops(device: str, dtype: str, *, tf32: bool = False) -> float | None:
    """Peak operations per second of a device in dense matrix products.

    Args:
        device: name of a GPU as torch gives it, such as "NVIDIA H100 80GB HBM3".
        dtype: `bfloat16` or `float32`.
        tf32: whether float32 products may be rounded to TensorFloat-32, which has half the peak of bfloat16.

    Returns:
        The peak; None where it is unknown.
    """
    name = _MAKER.sub("", device)
    peak = next((peak for peak in _PEAKS if re.fullmatch(peak.names, name)), None)
    if peak is None:
        return None
    tensor_cores = None if peak.bfloat16 is None else 1e12 * peak.bfloat16
    if dtype == "bfloat16":
        return tensor_cores
    return tensor_cores / 2 if tf32 and tensor_cores is not None else 1e12 * peak.float32
