"""What every test runs under: no Hub, no progress bars, one thread per process, the same random numbers."""

import os

# Read when huggingface_hub is first imported, so before everything else.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever ran before in the process: a limit that holds for one set of numbers may not hold for one in a hundred
    others."""
    torch.manual_seed(0)
