"""The benchmark behind `python eval/fid_bench.py`: images generated, scored and timed."""
