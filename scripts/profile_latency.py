"""Where the time of a generation goes: the `vsparse latency` command, for a checkout that is not installed."""

from __future__ import annotations

import sys

from vsparse.cli import app

if __name__ == "__main__":
    app(["latency", *sys.argv[1:]], prog_name="profile_latency.py")
