"""TRL's side of bench.step and of the fixtures in tests/reference/trl: its GRPOTrainer on given rows, nothing generated.

Runs in TRL's own environment (`python -m bench.install` makes it), so this file imports torch, transformers and trl and
nothing of the trainer. What always holds: the batch is padded as GRPOTrainer pads it (prompts left, completions right, each to
the longest of the whole generation batch) and split as it splits it, and the loss is its own compute_loss.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from bench.resident import peak_bytes, reset_peak, resident_bytes

# N rows, P the longest prompt, C the longest completion.


def grpo_trainer(model: LlamaForCausalLM, directory: Path, **options: Any) -> GRPOTrainer:
    """Return a GRPOTrainer around the model, on the CPU in float32, that will never be asked to generate."""
    model.save_pretrained(directory)  # with a KL term it loads its reference model from a directory
    model.config._name_or_path = str(directory)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({str(at): at for at in range(8)}, unk_token="0")),
        eos_token="0",
        pad_token="0",
    )
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        num_generations=2,
        per_device_train_batch_size=options.pop("per_device_train_batch_size", 2),
        gradient_accumulation_steps=1,
        **options,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["0", "1"]}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(rows: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Return what GRPOTrainer would have after generating these rows.

    rows  each {"prompt": ids, "completion": ids, "tool_mask": 0/1 per completion token, "old": log-probs per completion
          token, "advantage": float, and "reference" like "old" where there is a reference}
    """
    longest_prompt = max(len(row["prompt"]) for row in rows)
    longest_completion = max(len(row["completion"]) for row in rows)

    def left(values: Sequence[float], fill: float) -> list[float]:
        return [fill] * (longest_prompt - len(values)) + list(values)

    def right(values: Sequence[float], fill: float) -> list[float]:
        return list(values) + [fill] * (longest_completion - len(values))

    batch = {
        "prompt_ids": torch.tensor([left(row["prompt"], pad_id) for row in rows]),
        "prompt_mask": torch.tensor([left([1] * len(row["prompt"]), 0) for row in rows]),
        "completion_ids": torch.tensor([right(row["completion"], pad_id) for row in rows]),
        "completion_mask": torch.tensor([right([1] * len(row["completion"]), 0) for row in rows]),
        "tool_mask": torch.tensor([right(row["tool_mask"], 0) for row in rows]),
        "old_per_token_logps": torch.tensor([right(row["old"], 0.0) for row in rows], dtype=torch.float32),
        "advantages": torch.tensor([row["advantage"] for row in rows], dtype=torch.float32),
    }
    if "reference" in rows[0]:
        batch["ref_per_token_logps"] = torch.tensor([right(row["reference"], 0.0) for row in rows])
    batch["num_items_in_batch"] = (batch["completion_mask"] * batch["tool_mask"]).sum()
    return batch


# -- a member of bench.step's crew ------------------------------------------------------------------------------------


def main(directory: Path) -> None:
    """Take one optimiser step for every line on stdin and print the seconds it took.

    directory  model/ (a Llama), rows.json (as `padded` has them), options.json: {"threads", "micro_batch_rows", "lr"}
    """
    options = json.loads((directory / "options.json").read_text())
    torch.set_num_threads(options["threads"])
    rows = json.loads((directory / "rows.json").read_text())
    before = resident_bytes()
    model = LlamaForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        micro_rows = options["micro_batch_rows"]
        trainer = grpo_trainer(
            model,
            Path(scratch),
            loss_type="dapo",
            epsilon_high=0.28,
            per_device_train_batch_size=micro_rows,
            max_completion_length=max(len(row["completion"]) for row in rows),
        )
        model.train()
        batch = padded(rows)
        # What _prepare_inputs does after generating: slices of the padded batch, the count of tokens in each.
        micro_batches = [
            {name: value if value.dim() == 0 else value[at : at + micro_rows] for name, value in batch.items()}
            for at in range(0, len(rows), micro_rows)
        ]
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=options["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        print("ready", flush=True)
        for _ in sys.stdin:
            reset_peak()
            began, began_cpu = time.perf_counter(), time.process_time()
            losses = []
            for inputs in micro_batches:
                loss = trainer.compute_loss(model, inputs)
                trainer.accelerator.backward(loss)
                losses.append(float(loss.detach()))
            norm = float(trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
            said = {"loss": sum(losses), "grad_norm": norm, **took, "peak_bytes": peak_bytes() - before}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
