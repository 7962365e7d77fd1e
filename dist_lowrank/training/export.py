"""The trained model and tokenizer in Hugging Face format, and a sample of what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar


def export_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    """Gathers the weights and writes safetensors, configuration and tokenizer. Collective.

    Returns:
        On rank 0 the whole model on the CPU, on other ranks None.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    weights = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    whole = AutoModelForCausalLM.from_config(module.config, trust_remote_code=False)
    whole.load_state_dict(weights)
    whole.config.use_cache = True
    disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.partial")
    whole.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    temporary.replace(folder)
    return whole


@torch.no_grad()
def sample_text(model: Any, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int) -> str:
    """Text that the model continues from nothing but an end of document, drawn at temperature 0.8 from its top 50."""
    set_seed(seed)
    prompt = torch.tensor([[tokenizer.eos_token_id]])
    written = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        eos_token_id=None,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(written[0, 1:], skip_special_tokens=True)).strip()
