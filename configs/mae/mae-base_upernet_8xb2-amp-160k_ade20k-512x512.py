# MMSegmentation's own config of this name, on the encoder of a pruned pre-training; from another one by
#   --cfg-options model.backbone.init_cfg.checkpoint=PRE-TRAINED.pth
_base_ = [
    __import__('infobatch_mm.zoo').zoo.config_path('mmseg', 'mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py')
]

# MMSegmentation's MAE would silently load nothing of MMPretrain's checkpoint, where all names have a prefix.
# MMPretrain's BEiTViT takes it as it is, and is the same network: an encoder that learns relative positions and layer
# scales too.
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmpretrain.BEiTViT',
        arch='base',
        img_size=(512, 512),
        patch_size=16,
        bias=True,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        layer_scale_init_value=1.0,
        drop_path_rate=0.1,
        out_type='featmap',
        out_indices=[3, 5, 7, 11],
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vit-base-p16_8xb512-amp-coslr-infobatch-1600e_in1k/epoch_1600.pth',
            prefix='backbone.')))
