# Microscopy tiles of 128 x 128 (4,107 training, 793 test) laid out like ADE20K. Say where they are:
#   NUCLEI_ROOT=/path/to/nuclei python tools/train.py CONFIG
_base_ = ['../_base_/fcn_r18-tiny.py', '../_base_/default_runtime.py']

data_root = '{{$NUCLEI_ROOT:data/nuclei}}'
metainfo = dict(
    classes=('background', 'nucleus', 'nucleus_boundary'),
    palette=[[0, 0, 0], [220, 220, 120], [200, 60, 60]])
losses = [
    dict(type='CrossEntropyLoss', loss_weight=1.0),
    dict(type='DiceLoss', use_sigmoid=False, loss_weight=1.0)
]
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    decode_head=dict(num_classes=3, loss_decode=losses),
    auxiliary_head=dict(num_classes=3))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomFlip', prob=0.5, direction='vertical'),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16,
    num_workers=1,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='images/test', seg_map_path='annotations/test'),
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.0005))
# 2053 iterations of 16 are 8 passes over 4,107 tiles.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, begin=60, end=2053)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2053, val_interval=514)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
randomness = dict(seed=0)
