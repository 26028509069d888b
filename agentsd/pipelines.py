from pathlib import Path
DEMO_MODEL = Path(__file__).parent / "demo_model"
