"""What train_demo_model.py needs beside its stages: composed pictures, and a UNet that grows out of a smaller one."""
