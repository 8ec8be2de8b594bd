# Layer-wise decay of the learning rate, 0.9 per block from the last to the position embedding. Norms decay as all do.
_base_ = 'schedule_12ep.py'

lr_mults = {f'backbone.net.blocks.{i}.': dict(lr_mult=0.9 ** (40 - i)) for i in range(40)}
lr_mults['backbone.net.pos_embed'] = dict(lr_mult=0.9**41)
optim_wrapper = dict(paramwise_cfg=dict(_delete_=True, custom_keys=lr_mults))
