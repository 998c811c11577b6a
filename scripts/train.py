"""The main job as a script, for `accelerate launch`:

accelerate launch --config_file accelerate_configs/ddp.yaml scripts/train.py --config recipes/quickstart.yaml
"""

import sys

from hf_momentum.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
