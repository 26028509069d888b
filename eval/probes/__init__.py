"""Training a small network that truly needs its self-attention, and the gate that says whether it does."""
