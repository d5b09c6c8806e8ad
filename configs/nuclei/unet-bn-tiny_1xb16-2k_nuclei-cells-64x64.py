_base_ = './unet-gn-tiny_1xb16-2k_nuclei-cells-64x64.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(norm_cfg=dict(_delete_=True, **norm_cfg)),
    decode_head=dict(norm_cfg=dict(_delete_=True, **norm_cfg)))
