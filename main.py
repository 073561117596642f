"""Fine-tune Stable Diffusion on a folder of captioned pictures: ``python main.py --help`` says how.

Defines nothing: a class that is defined in the file one runs exists twice, as ``__main__.X`` and as ``main.X``.
The names below are those that configuration files call ``main.X``.
"""

import sys

from ldm.data.data_module import DataModuleFromConfig, WrappedDataset
from ldm.training.callbacks import CUDACallback
from ldm.training.image_logger import ImageLogger
from ldm.training.run import main
from ldm.util import instantiate_from_config

if __name__ == "__main__":
    sys.exit(main())
