"""What every test has: one thread, a fixed seed, and small models made once a session."""

import os
from pathlib import Path

import pytest
import torch

import tiny

torch.set_num_threads(1)
# Processes that tests start find what tests share.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama: 3 blocks, tied embeddings, bfloat16, several shards. Read only."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of token ids [8, 64] for the tiny Llama. Read only."""
    return tiny.save_tokens(tmp_path_factory.mktemp("tokens") / "tokens.safetensors")
