"""The stages of train_demo_model.py, one module each, and what they share.

None imports from one that comes after it: canvases, growing, key_subset, sharpening; presets, run; icons (stage data),
pictures, tokenizer, models, training; samples, autoencoder, unet, export (the stages of these names).
"""
