"""Advice for a folder that has files of another kind in place of a readable checkpoint."""

from pathlib import Path

# Files that are looked for -> what a folder that holds one is; the first that is found tells.
FORMS = {
    "adapter_config.json": "is a LoRA adapter, not a model; merge it into its base model (peft: merge_and_unload, then "
    "save_pretrained) and pass that folder",
    "ledger.jsonl": "is a run of shardq that is not finished, or has lost its {index}; run its own command again",
    "consolidated*": "is in Mistral's own format ({found}); pass the model in Hugging Face's format, which has a "
    "config.json and {single} or an index",
    "model-*-of-*.safetensors": "holds {found}, but no {index}; download that, and the shards that it names",
    "*.safetensors": "holds {found}, which is no checkpoint's name; if it is the whole model, rename it to {single}",
    "*.gguf": "is for llama.cpp ({found}); pass the Hugging Face checkpoint that it was made from",
    "*.bin": "holds weights as {found} alone, which can run code as it is read; load it with transformers, write it "
    "with save_pretrained, which makes safetensors, and pass that folder",
    "*.pth": "holds weights as {found} alone, which can run code as it is read; pass the Hugging Face checkpoint",
}


def what_it_is(folder: Path, single: str, index: str) -> str:
    """The kind of files that a folder has in place of a checkpoint, and what to do, in words.

    Args:
        single, index: names of the two files of which a checkpoint has one.
    """
    for pattern, said in FORMS.items():
        found = min(folder.glob(pattern), default=None)
        if found:
            return said.format(found=found.name, single=single, index=index)
    return f"holds neither {index} nor {single}; pass the folder of a Hugging Face checkpoint in safetensors"
