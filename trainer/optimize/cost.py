"""What a step costs in arithmetic, to compare the time that it took with what the device could do.

Model FLOPs utilisation (MFU, PaLM, arXiv 2204.02311, appendix B) counts what the mathematics asks for, forward and
backward, once: recomputing activations, masked-out attention and padding cost time and earn nothing.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from trainer.data.batch import PackedBatch
from trainer.policy.logprob import head_weight

# Dense bfloat16 FLOP/s, as the makers state them, by a word of the device's name. The first that fits counts.
PEAK_FLOPS_PER_S = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def step_flops(model: PreTrainedModel, packs: Sequence[PackedBatch]) -> float:
    """Return the FLOPs of one forward and backward pass over the packs.

    A matrix of N weights costs 2 N for each token that it sees, and twice that backward. The layers see every token,
    the head only those that are scored, the embedding is looked up. Attention of H heads of width W costs, in each
    layer, 4 H W for each pair of tokens of a row of which one may see the other: L (L + 1) / 2 pairs.
    """
    config = model.config.get_text_config()
    head = head_weight(model)
    skipped = {id(head), *map(id, model.get_input_embeddings().parameters())}
    layers = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and id(weight) not in skipped)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_width
    tokens = sum(sum(pack.row_lengths) for pack in packs)
    scored = sum(int(pack.trained_T.sum()) for pack in packs)
    pairs = sum(length * (length + 1) // 2 for pack in packs for length in pack.row_lengths)
    return 3.0 * (2 * layers * tokens + 2 * head.numel() * scored + attention * pairs)


def peak_flops_per_s(device: torch.device) -> float | None:
    """Return what a known GPU can do in dense bfloat16, and None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in PEAK_FLOPS_PER_S.items() if word in name), None)
