# Microscopy tiles of 128 x 128 (4,107 training, 793 test) laid out like ADE20K. Say where they are:
#   NUCLEI_ROOT=/path/to/nuclei python tools/train.py CONFIG
_base_ = ['../_base_/fcn_r18-tiny.py', '../_base_/small_run.py', '../_base_/default_runtime.py']

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
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dataset)
test_dataloader = val_dataloader

# 2053 iterations of 16 are 8 passes over 4,107 tiles.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, begin=60, end=2053)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2053, val_interval=514)
