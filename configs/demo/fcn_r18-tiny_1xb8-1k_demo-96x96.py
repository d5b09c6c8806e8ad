# The unpruned twin: an iteration-based run as on ADE20K, on the scenes that `make demo-data` draws.
_base_ = ['../_base_/fcn_r18-tiny.py', '../_base_/small_run.py', '../_base_/default_runtime.py']

crop_size = (64, 64)
# The scenes show eight of the first 27 of ADE20K's 150 classes: logits for the rest would only cost time.
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=27),
    auxiliary_head=dict(num_classes=27))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(96, 96), ratio_range=(0.9, 1.3), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs')
]
dataset = dict(type='ADE20KDataset', data_root='data/demo')
train_dataloader = dict(dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, begin=60, end=1440)
]
# 1440 iterations of 8 are 24 passes over 480 scenes.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1440, val_interval=120)
default_hooks = dict(checkpoint=dict(interval=360))
