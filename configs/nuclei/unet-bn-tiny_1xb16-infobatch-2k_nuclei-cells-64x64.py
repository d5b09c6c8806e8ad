# Under batch statistics the loss does not separate over samples: chances that differ less, and running statistics that
# are estimated on uniform batches, were the best of what was measured (docs/results.md).
_base_ = './unet-bn-tiny_1xb16-2k_nuclei-cells-64x64.py'

custom_imports = dict(imports=['infobatch_mm.engine'], allow_failed_imports=False)
custom_hooks = [
    dict(
        type='InfoBatchHook',
        policy=dict(type='variance', target_saving=0.61, delta=1.0, pi_min=0.25),
        norm='recalibrate')
]
