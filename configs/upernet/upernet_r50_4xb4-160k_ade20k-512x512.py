# MMSegmentation's own config of this name, wherever it is installed.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmseg', 'upernet/upernet_r50_4xb4-160k_ade20k-512x512.py')]
