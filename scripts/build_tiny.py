"""Write a tiny, random, genuine diffusers pipeline to a folder: `python scripts/build_tiny.py wan out/tiny-wan`.

For trying things out without a download; its pictures are noise. `vsparse demo` uses the trained one in
`vsparse/assets`. HunyuanVideo is not offered: its tiny pipelines have no text encoders, so they would not load again.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # where the builders are, for the tests

import tiny_pipelines


def main() -> None:
    builders = {
        "wan": tiny_pipelines.wan,
        "wan_two_experts": lambda: tiny_pipelines.wan(experts=2),
        "wan_image": tiny_pipelines.wan_image,
        "wan_vace": tiny_pipelines.wan_vace,
        "cogvideox": tiny_pipelines.cogvideox,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=sorted(builders))
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists already")
    pipe, _ = builders[arguments.host]()
    pipe.save_pretrained(arguments.folder)
    print(f"{type(pipe).__name__} written to {arguments.folder}")


if __name__ == "__main__":
    main()
