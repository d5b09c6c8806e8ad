# CamVid (367 training, 233 test images of 240 x 180) laid out like ADE20K. Say where it is:
#   CAMVID_ROOT=/path/to/camvid python tools/train.py CONFIG
# or --cfg-options data_root=/path/to/camvid with our tools.
_base_ = ['../_base_/fcn_r18-tiny.py', '../_base_/small_run.py', '../_base_/default_runtime.py']

data_root = '{{$CAMVID_ROOT:data/camvid}}'
crop_size = (128, 128)
metainfo = dict(
    classes=('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist'),
    palette=[[128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222], [128, 128, 0],
             [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192]])
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(240, 180), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(**dataset, pipeline=train_pipeline))
# CamVid's validation split is one clip of the same drive: validate and report on the test split.
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader

# 3670 iterations of 8 are 80 passes over 367 images.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=60),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, by_epoch=False, begin=60, end=3670)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=3670, val_interval=460)
