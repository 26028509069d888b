"""Whether a model can judge attention methods: the gate behind `python eval/demo_gate.py`."""
