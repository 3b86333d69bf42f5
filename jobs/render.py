"""The main job, for `ray job submit`: `python jobs/render.py MANIFEST --output URI [options]`.

The same as `ltx-ray render`; run it with --help for the options.
"""

import sys
from pathlib import Path

# The cluster needs a clone, which need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ltx_ray.cli import main

if __name__ == "__main__":
    main(["render", *sys.argv[1:]])
