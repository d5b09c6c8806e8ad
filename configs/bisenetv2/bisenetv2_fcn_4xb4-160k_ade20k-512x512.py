# BiSeNetV2, a real-time model, on ADE20K. MMSegmentation has it on Cityscapes only: its model and schedule,
# with ADE20K's data and classes.
_base_ = [
    __import__('infobatch_mm.zoo').zoo.config_path('mmseg', '_base_/models/bisenetv2.py'),
    __import__('infobatch_mm.zoo').zoo.config_path('mmseg', '_base_/datasets/ade20k.py'),
    __import__('infobatch_mm.zoo').zoo.config_path('mmseg', '_base_/default_runtime.py'),
    __import__('infobatch_mm.zoo').zoo.config_path('mmseg', '_base_/schedules/schedule_160k.py')
]
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150),
    auxiliary_head=[
        dict(
            type='FCNHead',
            in_channels=in_channels,
            channels=channels,
            num_convs=2,
            num_classes=150,
            in_index=in_index,
            norm_cfg=norm_cfg,
            concat_input=False,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0))
        for in_index, (in_channels, channels) in enumerate(((16, 16), (32, 64), (64, 256), (128, 1024)), start=1)
    ])
param_scheduler = [
    dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=1000),
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=1000, end=160000, by_epoch=False)
]
optimizer = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.0005)
optim_wrapper = dict(type='OptimWrapper', optimizer=optimizer)
