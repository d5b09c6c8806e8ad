# A segmentor of nuclei that starts from the tiny masked autoencoder's encoder: 1,000 iterations on crops of 64 x 64.
#   NUCLEI_ROOT=/path/to/nuclei python tools/train.py CONFIG \
#       --cfg-options model.backbone.init_cfg.checkpoint=PRE-TRAINED.pth
_base_ = ['../_base_/fcn_mae-vit-tiny.py', '../_base_/small_run.py', '../_base_/default_runtime.py']

metainfo = dict(
    classes=('background', 'nucleus', 'nucleus_boundary'),
    palette=[[0, 0, 0], [220, 220, 120], [200, 60, 60]])
model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='work_dirs/mae_vit-tiny-p8_1xb64-coslr-infobatch-40e_nuclei-64px/epoch_40.pth')),
    decode_head=dict(num_classes=3))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
dataset = dict(type='BaseSegDataset', data_root='{{$NUCLEI_ROOT:data/nuclei}}', metainfo=metainfo)
train_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dataset)
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=1000)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=500)
