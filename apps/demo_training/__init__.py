"""The stages of train_demo_model.py, one module each, and what they share.

None imports from one that comes after it: growing, key_subset, sharpening; presets, run; icons (stage data),
images, tokenizer, models, training; samples, autoencoder, unet, export (the stages of these names).
gate, effective_keys and gate_reference judge the model; they belong to demo_gate.py.
"""
