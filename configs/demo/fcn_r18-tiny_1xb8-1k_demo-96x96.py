# The unpruned twin: an iteration-based run as on ADE20K, on the scenes that `make demo-data` draws.
_base_ = ['../_base_/fcn_r18-tiny.py', '../_base_/demo_scenes.py', '../_base_/default_runtime.py']

model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    decode_head=dict(num_classes=27),
    auxiliary_head=dict(num_classes=27))

param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, begin=60, end=1440)
]
# 1440 iterations of 8 are 24 passes over 480 scenes.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1440, val_interval=120)
default_hooks = dict(checkpoint=dict(interval=360))
