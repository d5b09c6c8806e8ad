# K-Net with two rounds of kernel updates, as wide as two CPU cores train in minutes.
_base_ = './fcn-dice_r18-tiny_1xb16-2k_nuclei-128x128.py'

norm_cfg = dict(type='BN', requires_grad=True)
channels = 32
kernel_update_head = dict(
    type='KernelUpdateHead',
    num_classes=3,
    num_ffn_fcs=2,
    num_heads=4,
    num_mask_fcs=1,
    feedforward_channels=128,
    in_channels=channels,
    out_channels=channels,
    dropout=0.0,
    conv_kernel_size=1,
    ffn_act_cfg=dict(type='ReLU', inplace=True),
    with_ffn=True,
    feat_transform_cfg=dict(conv_cfg=dict(type='Conv2d'), act_cfg=None),
    kernel_updator_cfg=dict(
        type='KernelUpdator',
        in_channels=channels,
        feat_channels=channels,
        out_channels=channels,
        act_cfg=dict(type='ReLU', inplace=True),
        norm_cfg=dict(type='LN')))
model = dict(
    decode_head=dict(
        _delete_=True,
        type='IterativeDecodeHead',
        num_stages=2,
        kernel_update_head=[kernel_update_head, kernel_update_head],
        kernel_generate_head=dict(
            type='FCNHead',
            in_channels=128,
            in_index=3,
            channels=channels,
            num_convs=1,
            concat_input=True,
            dropout_ratio=0.1,
            num_classes=3,
            norm_cfg=norm_cfg,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0))))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.002, weight_decay=0.0005), clip_grad=dict(max_norm=1, norm_type=2))
