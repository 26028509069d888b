"""`python -m agentsd` is the agentsd command."""

import sys

from .cli import main

sys.exit(main())
