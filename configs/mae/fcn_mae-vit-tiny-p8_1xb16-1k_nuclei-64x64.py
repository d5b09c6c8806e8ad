# A segmentor that starts from the tiny masked autoencoder's encoder: 1,000 iterations on crops of 64 x 64.
#   NUCLEI_ROOT=/path/to/nuclei python tools/train.py CONFIG \
#       --cfg-options model.backbone.init_cfg.checkpoint=PRE-TRAINED.pth
_base_ = ['../_base_/small_run.py', '../_base_/default_runtime.py']

metainfo = dict(
    classes=('background', 'nucleus', 'nucleus_boundary'),
    palette=[[0, 0, 0], [220, 220, 120], [200, 60, 60]])
crop_size = (64, 64)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size),
    # MMPretrain's encoder takes MMPretrain's checkpoint as it is; MMSegmentation's own has other names.
    backbone=dict(
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=384),
        img_size=64,
        patch_size=8,
        out_type='featmap',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vit-tiny-p8_1xb64-coslr-infobatch-40e_nuclei-64px/epoch_40.pth',
            prefix='backbone.')),
    decode_head=dict(
        type='FCNHead',
        in_channels=96,
        in_index=0,
        channels=64,
        num_convs=2,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=3,
        norm_cfg=dict(type='BN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=crop_size))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
dataset = dict(type='BaseSegDataset', data_root='{{$NUCLEI_ROOT:data/nuclei}}', metainfo=metainfo)
train_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(batch_size=16, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=100, end=1000)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1000, val_interval=500)
