"""The Gradio app behind `python apps/demo.py`: settings <- models, jobs <- page, api <- server."""
