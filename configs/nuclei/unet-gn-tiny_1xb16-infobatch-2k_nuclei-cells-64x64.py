_base_ = './unet-gn-tiny_1xb16-2k_nuclei-cells-64x64.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [dict(type='InfoBatchHook', policy=dict(type='variance', target_saving=0.61, delta=1.0))]
