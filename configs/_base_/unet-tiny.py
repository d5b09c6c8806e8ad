# A UNet of widths 8 to 64. A config that inherits it says the norm_cfg of both parts and the number of classes. GELU:
# with ReLU, so narrow a network gets stuck on empty images with some seeds, where its last features are all on or off.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[63.75, 63.75, 63.75],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(
        type='UNet',
        base_channels=8,
        num_stages=4,
        strides=(1, 1, 1, 1),
        enc_num_convs=(2, 2, 2, 2),
        dec_num_convs=(2, 2, 2),
        downsamples=(True, True, True),
        enc_dilations=(1, 1, 1, 1),
        dec_dilations=(1, 1, 1),
        act_cfg=dict(type='GELU')),
    decode_head=dict(
        type='FCNHead',
        in_channels=8,
        in_index=3,
        channels=8,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
