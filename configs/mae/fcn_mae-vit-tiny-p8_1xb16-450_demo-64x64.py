# A segmentor of the demo's scenes that starts from the tiny masked autoencoder's encoder.
_base_ = ['../_base_/fcn_mae-vit-tiny.py', '../_base_/demo_scenes.py', '../_base_/default_runtime.py']

model = dict(
    backbone=dict(
        init_cfg=dict(checkpoint='work_dirs/mae_vit-tiny-p8_1xb64-coslr-infobatch-100e_demo-64px/epoch_100.pth')),
    decode_head=dict(num_classes=27))
train_dataloader = dict(batch_size=16)

optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=45),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=45, end=450)
]
# 450 iterations of 16 are 15 passes over 480 scenes.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=450, val_interval=150)
