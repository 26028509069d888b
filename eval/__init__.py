"""The benchmark behind `python eval/fid_bench.py`: its modules, with the repository's root on the import path."""
