"""The benchmark behind `python eval/fid_bench.py`; its modules import each other as eval.NAME from the repository's root."""
