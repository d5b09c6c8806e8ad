# A segmentor that starts from the tiny masked autoencoder's encoder. A config that inherits it says which: its
# backbone's init_cfg.checkpoint, and how many classes its data have.
_base_ = './fcn_r18-tiny.py'

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    # MMPretrain's encoder takes MMPretrain's checkpoint as it is; MMSegmentation's own has other names.
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=384),
        img_size=64,
        patch_size=8,
        out_type='featmap',
        init_cfg=dict(type='Pretrained', prefix='backbone.')),
    decode_head=dict(in_channels=96, in_index=0, channels=64, num_convs=2, concat_input=False),
    auxiliary_head=None,
    test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(64, 64)))
