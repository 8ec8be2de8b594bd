"""Models and their parts; importing this package registers them all."""

from .backbones.internimage import InternImage
from .backbones.simple_feature_pyramid import SimpleFeaturePyramid
from .backbones.swin import SwinTransformer
from .backbones.timm_backbone import TIMMBackbone
from .backbones.vitdet import ViTDet
from .dense_heads.dino_head import DINOHead
from .detectors.dino import DINO
from .layers.denoising import CDNGenerator
from .layers.query_selector import LearnedQueries, MixedQuerySelector, PureQuerySelector
from .layers.transformer import DINODecoder, DINOEncoder
from .losses.focal_loss import FocalLoss
from .losses.giou_loss import NormalizedGIoULoss
from .losses.set_criterion import SetCriterion
from .size_buckets import PadToBuckets
from .task_modules.hungarian_matcher import HungarianMatcher

__all__ = [
    'DINO',
    'CDNGenerator',
    'DINODecoder',
    'DINOEncoder',
    'DINOHead',
    'FocalLoss',
    'HungarianMatcher',
    'InternImage',
    'LearnedQueries',
    'MixedQuerySelector',
    'NormalizedGIoULoss',
    'PadToBuckets',
    'PureQuerySelector',
    'SetCriterion',
    'SimpleFeaturePyramid',
    'SwinTransformer',
    'TIMMBackbone',
    'ViTDet',
]
