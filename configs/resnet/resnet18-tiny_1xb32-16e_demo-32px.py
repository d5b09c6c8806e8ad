# The unpruned twin: a small classifier by epochs, on the pictures that `make demo-shapes` draws.
_base_ = ['../_base_/resnet18-tiny.py', '../_base_/small_cls_run.py']

data_preprocessor = dict(
    num_classes=10,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=2),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs')
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
dataset = dict(type='CustomDataset', data_root='data/demo-shapes')
train_dataloader = dict(batch_size=32, dataset=dict(**dataset, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=15, begin=1, end=16, convert_to_iter_based=True)
]
train_cfg = dict(by_epoch=True, max_epochs=16, val_interval=1)
