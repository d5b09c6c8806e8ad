# MMSegmentation's own config of this name, wherever it is installed.
_base_ = [__import__('infobatch_mm.zoo').zoo.config_path('mmseg', 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py')]
