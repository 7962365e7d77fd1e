"""The trained model and tokenizer in Hugging Face format, and a sample of what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils.logging import disable_progress_bar


def export_model(
    weights: dict[str, torch.Tensor], configuration: Any, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> Any:
    """Writes safetensors, configuration and tokenizer.

    Args:
        weights: the model's state dict, on the CPU.
        configuration: of the model, `transformers`' own.

    Returns:
        The whole model on the CPU.
    """
    whole = AutoModelForCausalLM.from_config(configuration, trust_remote_code=False)
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
