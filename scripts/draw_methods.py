"""Draw docs/images/methods/: what every method keeps of the same attention: `python scripts/draw_methods.py`."""

from __future__ import annotations

from pathlib import Path

from vsparse.measure import portraits

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images" / "methods"


def main() -> None:
    written = [portraits.draw_attention(FOLDER / "attention.png")]
    written += [
        portraits.draw_method(FOLDER / f"{line.method}.png", line, value) for line, value in portraits.portrait_lines()
    ]
    for path in written:
        print(f"{path.relative_to(FOLDER.parents[2])}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
