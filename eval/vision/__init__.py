"""The benchmark behind `python eval/vision_bench.py`: one file per stage."""
