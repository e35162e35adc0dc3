"""One thread, so that tests do not fight over the processor."""

import torch

torch.set_num_threads(1)
