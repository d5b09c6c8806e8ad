# MMPretrain's own config, on the encoder of a pruned pre-training; from another one by
#   --cfg-options model.backbone.init_cfg.checkpoint=PRE-TRAINED.pth
_base_ = [
    __import__('infobatch_mm.zoo').zoo.config_path(
        'mmpretrain', 'mae/benchmarks/vit-base-p16_8xb128-coslr-100e_in1k.py')
]

model = dict(
    backbone=dict(init_cfg=dict(
        checkpoint='work_dirs/mae_vit-base-p16_8xb512-amp-coslr-infobatch-1600e_in1k/epoch_1600.pth')))
