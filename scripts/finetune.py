"""Fine-tune a video diffusion transformer with sparse attention: `accelerate launch scripts/finetune.py run.toml`.

The same as `vsparse finetune run.toml`; `--example` prints a settings file that explains every key.
"""

from __future__ import annotations

import sys

from vsparse.cli import app

if __name__ == "__main__":
    app(["finetune", *sys.argv[1:]], prog_name="vsparse")
