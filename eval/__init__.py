"""The benchmarks: commands are the files here, their work is in the folders, imported from the repository's root."""
