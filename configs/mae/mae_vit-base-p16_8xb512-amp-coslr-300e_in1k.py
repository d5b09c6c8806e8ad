# MMPretrain's own config of this name, wherever it is installed.
_base_ = [
    __import__('infobatch_mm.zoo').zoo.config_path('mmpretrain', 'mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py')
]
