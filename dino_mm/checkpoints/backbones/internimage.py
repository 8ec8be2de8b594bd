"""InternImage: the authors' release and detrex's detectors have the same names."""

from ..names import NameMap

ORIGINAL = NameMap(
    title='InternImage (OpenGVLab names)',
    signature=(r'^patch_embed\.conv1\.weight$', r'^levels\.0\.blocks\.0\.dcn\.dw_conv\.0\.weight$'),
    renames=(
        # There, a norm sits in a Sequential beside what moves the channels.
        (r'\.(norm\d?)\.[01]\.', r'.\1.'),
        (r'^patch_embed\.(conv|norm)1\.', r'patch_embed.0.\1.'),
        (r'^patch_embed\.(conv|norm)2\.', r'patch_embed.2.\1.'),
        (r'\.dw_conv\.0\.', '.depthwise.0.conv.'),
        (r'\.dw_conv\.1\.1\.', '.depthwise.0.norm.'),
        # There, a stage ends with the convolution that ours begins with.
        *((rf'^levels\.{stage}\.downsample\.', f'stages.{stage + 1}.downsample.') for stage in range(3)),
        (r'^levels\.', 'stages.'),
    ),
    dropped=(
        (r'^conv_head\.', 'classification head'),
        (r'^head\.', 'classification head'),
        (r'\.dcn\.center_feature_scale_proj_(weight|bias)$', 'only InternImage-H and -G mix in the centre feature'),
    ),
)
