"""Naming schemes of bare backbones, as their authors publish them and as detrex's detectors hold them."""

from . import convnext, focalnet, internimage, resnet, swin, timm, vitdet

#: Of several that match a checkpoint's names, the first that fits the model is taken.
BACKBONES = (
    resnet.TORCHVISION,
    resnet.DETECTRON2,
    swin.ORIGINAL,
    swin.OPENMMLAB,
    focalnet.FOCALNET,
    focalnet.FOCALNET_POST_NORM,
    focalnet.TIMM_FOCALNET,
    convnext.CONVNEXT,
    convnext.TIMM_CONVNEXT,
    internimage.ORIGINAL,
    vitdet.DETREX,
    vitdet.DETECTRON2,
    vitdet.MAE,
    vitdet.MAE_PYRAMID,
)

__all__ = ['BACKBONES', 'timm']
