import os
from tempfile import TemporaryDirectory

import torch

torch.set_num_threads(1)
# What `--data self` keeps for another conversion is not the user's.
assets = TemporaryDirectory(prefix="linearize-tests-")
os.environ["HF_ASSETS_CACHE"] = assets.name
