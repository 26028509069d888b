"""DreamBooth with agent attention: the parts of apps/dreambooth.py."""
