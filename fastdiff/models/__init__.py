"""Networks: settings → modules with improved-diffusion's parameter names."""

from fastdiff.models.settings import BackboneSettings, SuperResSettings, UNetSettings
from fastdiff.models.unet import SuperResUNet, UNet, build_model

__all__ = ["BackboneSettings", "SuperResSettings", "SuperResUNet", "UNet", "UNetSettings", "build_model"]
