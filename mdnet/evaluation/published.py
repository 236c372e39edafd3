"""Published results on SCUT-FBP5500, each with its protocol and source; none was measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One result. Errors are in rating points; `None` where the source gives no figure."""

    method: str
    protocol: str | None
    """`cv5` or `60-40`; `None` where what we could read of the source does not tell."""
    pearson: float
    mae: float | None
    rmse: float | None
    source: str


_COMBOLOSS = "lucasxlu/ComboLoss on GitHub (Xu and Xiang, arXiv 2010.10721)"
_RELEASE = "HCIILAB/SCUT-FBP5500-Database-Release on GitHub (Liang et al., arXiv 1801.06345)"

PUBLISHED: tuple[Published, ...] = (
    Published("AlexNet", "cv5", 0.8634, 0.2651, 0.3481, _RELEASE),
    Published("ResNet-18", "cv5", 0.8900, 0.2419, 0.3166, _RELEASE),
    Published("ResNeXt-50", "cv5", 0.8997, 0.2291, 0.3017, _RELEASE),
    Published("R³CNN", "cv5", 0.9142, 0.2120, 0.2800, f"Lin et al., IEEE TAC 2019, as quoted by {_COMBOLOSS}"),
    Published("ComboLoss (SE-ResNeXt-50)", "cv5", 0.9199, 0.2050, 0.2704, _COMBOLOSS),
    Published("AlexNet", "60-40", 0.8298, 0.2938, 0.3819, _RELEASE),
    Published("ResNet-18", "60-40", 0.8513, 0.2818, 0.3703, _RELEASE),
    Published("ResNeXt-50", "60-40", 0.8777, 0.2518, 0.3325, _RELEASE),
    Published("ComboLoss (SE-ResNeXt-50)", "60-40", 0.9117, 0.2126, 0.2813, _COMBOLOSS),
    Published("MD-Net (SynergyNet)", None, 0.9235, None, None, "arXiv 2509.17172, abstract"),
    Published("Mamba-CNN", None, 0.9187, 0.2022, 0.2610, "arXiv 2509.01431, abstract"),
    Published("VM-BeautyNet", None, 0.9212, 0.2085, 0.2698, "arXiv 2510.16220, abstract"),
    Published("Diff-FBP (frozen diffusion transformer)", None, 0.932, None, None, "arXiv 2507.20363, abstract"),
    Published(
        "ViT-FBP (an outlier)",
        None,
        0.9534,
        None,
        None,
        "Facial Beauty Prediction Based on Vision Transformer, abstract",
    ),
)


def published(protocol: str) -> list[Published]:
    """All of them, those of `protocol` first."""
    return sorted(PUBLISHED, key=lambda result: result.protocol != protocol)
