"""``python -m vsparse`` is the ``vsparse`` command."""

from vsparse.cli import main

if __name__ == "__main__":
    main()
